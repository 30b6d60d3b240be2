"""OPT in its nine sizes: Zhang et al. 2022 (2205.01068), table 1 and section 2.2.

    instar pretrain --config configs/pretrain/opt.py:125m --workdir runs/opt/125m \\
        --config.hardware=h100-8

The data set, prepared for rows of 2048 tokens, is to be in runs/opt/data (`data.path`). Published:
175b took about two months on 992 A100 of 80 GB, restarts included, at 147 TFLOP/s a GPU with the
recomputed forward pass counted.

As in the paper: normal initialisation of deviation .006, over sqrt(2L) where a matrix writes into
the residual stream; dropout, but none on the embeddings; linear decay over 300 billion tokens; a
batch of constant size. Of the largest model's run are left out what was changed by hand on the way:
lower learning rates after divergences, and a clip that went down to .3 (section 2.5). It computed
in float16 with a scaled loss, here it is bfloat16, which needs none. Attention weights have no
dropout.

Large sizes set `mesh.tensor`, which no preset of `hardware` reckons with: leave that out there, and
`mesh.fsdp` takes the other devices.
"""

from typing import Literal

from ml_collections import ConfigDict

LENGTH = 2048
# Rows of a batch, and the peak of the learning rate.
SIZES = {
    "125m": (256, 6e-4),
    "350m": (256, 3e-4),
    "1.3b": (512, 2e-4),
    "2.7b": (512, 1.6e-4),
    "6.7b": (1024, 1.2e-4),
    "13b": (2048, 1e-4),
    "30b": (2048, 1e-4),
    "66b": (1024, 0.8e-4),
    "175b": (1024, 1.2e-4),
}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    rows, learning_rate = SIZES[size]
    return ConfigDict(
        dict(
            data=dict(path="runs/opt/data", sequence_length=LENGTH),
            model=dict(family="opt", size=size, vocab_size=50272),
            initialization=dict(scheme="opt"),
            tokens=300_000_000_000,
            batch=dict(size=rows),
            dropout=0.1,
            embedding_dropout=0.0,
            optimizer=dict(
                learning_rate=learning_rate, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0
            ),
            # 2000 steps of the largest model, 375 million tokens of the others.
            schedule=dict(
                kind="linear",
                warmup_rows=2000 * rows if size == "175b" else 375_000_000 // LENGTH,
                decay_rows=300_000_000_000 // LENGTH,
                final_fraction=0.1,
            ),
            compute_dtype="bfloat16",
            mesh=dict(tensor=8 if size in ("30b", "66b", "175b") else 1),
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
