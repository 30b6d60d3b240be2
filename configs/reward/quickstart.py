"""What people think of single sentences: rankings of sixteen, by two networks.

    instar reward --config configs/reward/quickstart.py --workdir runs/quickstart/reward

The second phase; the first is `quickstart_labels.py`. Two cores of an Intel Xeon that others
use too: two minutes and a half, with the bag of words that it is compared with. Result: 75.1 % of
held-out pairs as people order them (the bag of words 76.3 %); 67.2 % on product reviews, 57.9 % on
editorials, 61.5 % on tweets.
"""

from ml_collections import ConfigDict

RATINGS = "runs/quickstart/demonstration/ratings"
SETS = ("held_out", "amazon", "nyt", "tweets")


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/quickstart/labels",
            # All ratings are on one scale, so that any sixteen sentences can be ranked.
            data=dict(
                path=f"{RATINGS}/train.jsonl",
                kind="ratings",
                group="any",
                completions=16,
                max_length=64,
            ),
            members=2,
            batch=dict(size=12),
            gap_margin=0.5,
            epochs=2.0,
            dropout=0.1,
            optimizer=dict(
                name="muon", muon_learning_rate=0.005, learning_rate=3e-3, weight_decay=0.0
            ),
            schedule=dict(kind="linear", warmup_steps=10, final_fraction=0.0),
            # Two cores gain nothing from a loop in the compiled program.
            execution=dict(unroll=0),
            checkpoint=dict(minutes=1.0),
            # PPO's coefficients then mean the same whatever a reward model's scale.
            normalise=dict(
                kind="samples",
                path="runs/quickstart/demonstration/prompts/train.jsonl",
                policy="runs/quickstart/sft",
                sampling=dict(max_new_tokens=40),
            ),
            evaluation=dict(
                every=100,
                sets={name: f"{RATINGS}/{name}.jsonl" for name in SETS},
                limit=256,
                texts=2000,
                baseline=(
                    f"{RATINGS}/train.jsonl",
                    "runs/quickstart/demonstration/labels/ratings.jsonl",
                ),
            ),
        )
    )
