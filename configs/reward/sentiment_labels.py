"""What people think of single sentences, beside what reviewers thought of whole films.

    instar reward --config configs/reward/sentiment_labels.py --workdir runs/sentiment/labels

The first phase of `sentiment.py`: six times the labels of `quickstart_labels.py`, read twice by
two networks in orders of their own. (Read once: 77.0 % of held-out pairs in the end, not 77.6 %.)
"""

from ml_collections import ConfigDict

DEMONSTRATION = "runs/sentiment/demonstration"


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/sentiment/pretrain",
            chat_template="plain",
            data=dict(
                path=f"{DEMONSTRATION}/ratings/train.jsonl",
                repeat=3,
                extra=f"{DEMONSTRATION}/labels/ratings.jsonl",
                kind="ratings",
                group="any",
                completions=16,
                max_length=64,
            ),
            members=2,
            batch=dict(size=8),
            # The closer two ratings are, the more their order is doubted.
            gap_noise=1.0,
            epochs=2.0,
            dropout=0.1,
            optimizer=dict(learning_rate=1.5e-3, weight_decay=0.0),
            schedule=dict(kind="linear", warmup_steps=20, final_fraction=0.1),
            # Two cores gain nothing from a loop in the compiled program.
            execution=dict(unroll=0),
            checkpoint=dict(minutes=1.0),
        )
    )
