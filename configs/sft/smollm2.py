"""A short fine-tuning that shows SmolLM2-135M-Instruct where sentences of film reviews end."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/smollm2/model",
            data=dict(path="runs/smollm2/dialogues", sequence_length=64),
            batch=dict(size=16, microbatch=8),
            steps=40,
            optimizer=dict(learning_rate=1e-4, weight_decay=0.0),
            schedule=dict(kind="cosine", warmup_steps=4),
            execution=dict(loss_chunk=16),
            checkpoint=dict(minutes=5.0),
            evaluation=dict(
                every=20,
                rows=16,
                prompts=("The film", "A movie that", "This is", "The acting"),
                sampling=dict(max_new_tokens=40),
            ),
        )
    )
