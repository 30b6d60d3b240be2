"""The demonstration set: 25,000 IMDb reviews.

instar prepare --config configs/data/quickstart.py --workdir runs/quickstart/data
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(dict(name="imdb", kind="demonstration"),),
            tokenizer=dict(kind="bpe", vocab_size=2048, train_bytes=10_000_000),
            sequence_lengths=(64, 128, 256),
            held_out=0.02,
        )
    )
