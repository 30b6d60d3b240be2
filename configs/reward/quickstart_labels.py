"""What people think of single sentences, beside what reviewers thought of whole films.

    instar reward --config configs/reward/quickstart_labels.py --workdir runs/quickstart/labels

The first of the two phases of the quickstart's reward model: sentences of positive reviews are to
score higher than those of negative ones, and rated sentences in their order. `quickstart.py` goes
on from it with the ratings alone. Two cores of an Intel Xeon that others use too: 1:41 and 2:01.
"""

from ml_collections import ConfigDict

DEMONSTRATION = "runs/quickstart/demonstration"


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/quickstart/pretrain",
            chat_template="plain",
            data=dict(
                path=f"{DEMONSTRATION}/ratings/train.jsonl",
                repeat=2,
                extra=f"{DEMONSTRATION}/labels/ratings.jsonl",
                kind="ratings",
                group="any",
                completions=16,
                max_length=64,
            ),
            batch=dict(size=8),
            gap_margin=0.25,
            epochs=1.0,
            dropout=0.1,
            optimizer=dict(learning_rate=1.5e-3, weight_decay=0.0),
            schedule=dict(kind="linear", warmup_steps=20, final_fraction=0.1),
            # Two cores gain nothing from a loop in the compiled program.
            execution=dict(unroll=0),
            checkpoint=dict(minutes=1.0),
        )
    )
