"""Falcon 7B, 40B and 180B: Almazrouei et al. 2023 (2311.16867) and the model cards.

    instar pretrain --config configs/pretrain/falcon.py:7b --workdir runs/falcon/7b \\
        --config.hardware=a100-8

The data set, prepared for rows of 2048 tokens, is to be in runs/falcon/data (`data.path`).
Published: 180b took about 7 million hours of an A100 of 40 GB, up to 4096 of them as tensor 8 x
pipeline 8 x data 64.

From the cards: learning rates, 4 billion tokens of warm-up, weight decay, z-loss, the batches and
the tokens over which they grow. Not in the cards, and assumed here: what the batch begins with and
grows by (128 rows), the betas (.9, .95), the clip (1) and the initialisation (that of GPT-3).

Large sizes set `mesh.tensor`, which no preset of `hardware` reckons with: leave that out there, and
`mesh.fsdp` takes the other devices.
"""

from typing import Literal

from ml_collections import ConfigDict

LENGTH = 2048
# Rows of a batch, the tokens over which it grows, the learning rate's peak and end, and the tokens.
SIZES = {
    "7b": (2304, 30_000_000_000, 6e-4, 1.2e-5, 1_500_000_000_000),
    "40b": (1152, 100_000_000_000, 1.85e-4, 1.85e-5, 1_000_000_000_000),
    "180b": (2048, 100_000_000_000, 1.25e-4, 1.25e-5, 3_500_000_000_000),
}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    rows, growing, peak, end, tokens = SIZES[size]
    return ConfigDict(
        dict(
            data=dict(path="runs/falcon/data", sequence_length=LENGTH),
            model=dict(family="falcon", size=size, vocab_size=65_024),
            tokens=tokens,
            batch=dict(
                size=rows,
                microbatch=128,
                ramp=dict(start=128, increment=128, rows=growing // LENGTH),
            ),
            z_loss=1e-4,
            optimizer=dict(learning_rate=peak, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
            schedule=dict(
                kind="cosine",
                warmup_rows=4_000_000_000 // LENGTH,
                decay_rows=tokens // LENGTH,
                final_fraction=end / peak,
            ),
            compute_dtype="bfloat16",
            mesh=dict(tensor=1 if size == "7b" else 8),
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
