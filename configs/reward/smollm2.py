"""A reward model of SmolLM2's size on people's ratings of film-review sentences."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    ratings = "runs/smollm2/demonstration/ratings"
    return ConfigDict(
        dict(
            parent="runs/smollm2/sft",
            data=dict(
                path=f"{ratings}/train.jsonl",
                kind="ratings",
                group="any",
                completions=8,
                max_length=64,
            ),
            batch=dict(size=4),
            epochs=1.0,
            optimizer=dict(learning_rate=5e-5, weight_decay=0.0),
            schedule=dict(kind="cosine", warmup_steps=15),
            checkpoint=dict(minutes=5.0),
        )
    )
