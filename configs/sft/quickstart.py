"""Fine-tuning the quickstart's model to begin, go on and end as sentences of film reviews do.

    instar sft --config configs/sft/quickstart.py --workdir runs/quickstart/sft

Two cores of an Intel Xeon that others use too: a minute. Result: of its sentences 84 % end within
40 tokens, and their perplexity under the pretrained model is 110.7.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/quickstart/pretrain",
            data=dict(path="runs/quickstart/dialogues", sequence_length=64),
            batch=dict(size=32),
            steps=250,
            dropout=0.1,
            optimizer=dict(learning_rate=1e-3, weight_decay=0.0),
            schedule=dict(kind="cosine", warmup_steps=10, final_fraction=0.05),
            execution=dict(unroll=0),
            checkpoint=dict(minutes=1.0),
            evaluation=dict(
                every=125,
                prompts=("The film", "A movie that", "This is", "The acting"),
                sampling=dict(max_new_tokens=40),
            ),
        )
    )
