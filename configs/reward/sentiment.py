"""The quickstart's reward model with more labels and more time: what its size can do.

    instar pipeline --config configs/pipeline/sentiment.py --workdir runs/sentiment

The second phase; the first is `sentiment_labels.py`.
"""

from ml_collections import ConfigDict

DEMONSTRATION = "runs/sentiment/demonstration"
RATINGS = f"{DEMONSTRATION}/ratings"
SETS = ("held_out", "amazon", "nyt", "tweets")


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/sentiment/labels",
            # All ratings are on one scale, so that any sixteen sentences can be ranked.
            data=dict(
                path=f"{RATINGS}/train.jsonl",
                kind="ratings",
                group="any",
                completions=16,
                max_length=64,
            ),
            batch=dict(size=12),
            gap_noise=1.0,
            epochs=3.0,
            dropout=0.2,
            optimizer=dict(
                name="muon", muon_learning_rate=0.005, learning_rate=3e-3, weight_decay=0.0
            ),
            schedule=dict(kind="linear", warmup_steps=10, final_fraction=0.0),
            # Two cores gain nothing from a loop in the compiled program.
            execution=dict(unroll=0),
            checkpoint=dict(minutes=1.0),
            evaluation=dict(
                every=100,
                sets={name: f"{RATINGS}/{name}.jsonl" for name in SETS},
                limit=256,
                texts=2000,
                baseline=(
                    f"{RATINGS}/train.jsonl",
                    f"{DEMONSTRATION}/labels/ratings.jsonl",
                ),
            ),
        )
    )
