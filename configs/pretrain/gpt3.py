"""GPT-3 in its eight sizes: Brown et al. 2020 (2005.14165), table 2.1 and appendix B.

    instar pretrain --config configs/pretrain/gpt3.py:125m --workdir runs/gpt3/125m \\
        --config.hardware=h100-8

The data set, prepared for rows of 2048 tokens, is to be in runs/gpt3/data (`data.path`). Published:
3.14e23 FLOP, 3640 PFLOP/s-days, for 175b and 300 billion tokens; 2.25e20 FLOP for 125m (table D.1).

Not published: how wide the bands of every second layer were (here all are dense, as the table's
FLOP count them; `--config.model.window=256` makes bands), which size grew its batch over how many
of the "4-12 billion" tokens (here the larger the batch, the more), the rows of a batch (here of
whole powers of two, and of 1600 for "3.2M" tokens), precision and dropout. Sizes printed wrongly in
table 2.1 are explained in `instar.families.gpt3`.

The microbatch is what the batch begins with and grows by: 16 rows, for up to 16 devices, or groups
of devices that `mesh.tensor` puts together. On more, set it and `batch.ramp` higher.

Large sizes set `mesh.tensor`, which no preset of `hardware` reckons with: leave that out there, and
`mesh.fsdp` takes the other devices.
"""

from typing import Literal

from ml_collections import ConfigDict

LENGTH = 2048
# Rows of a batch, the peak of the learning rate, and the tokens over which the batch grows.
SIZES = {
    "125m": (256, 6e-4, 4_000_000_000),
    "350m": (256, 3e-4, 4_000_000_000),
    "760m": (256, 2.5e-4, 4_000_000_000),
    "1.3b": (512, 2e-4, 6_000_000_000),
    "2.7b": (512, 1.6e-4, 6_000_000_000),
    "6.7b": (1024, 1.2e-4, 8_000_000_000),
    "13b": (1024, 1e-4, 8_000_000_000),
    "175b": (1600, 0.6e-4, 12_000_000_000),
}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    rows, learning_rate, growing = SIZES[size]
    return ConfigDict(
        dict(
            data=dict(path="runs/gpt3/data", sequence_length=LENGTH),
            model=dict(family="gpt3", size=size, vocab_size=50257),
            initialization=dict(scheme="gpt3"),
            tokens=300_000_000_000,
            batch=dict(
                size=rows,
                microbatch=16,
                ramp=dict(start=16, increment=16, rows=growing // LENGTH),  # from 32k tokens on
            ),
            optimizer=dict(
                learning_rate=learning_rate,
                b1=0.9,
                b2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
            # To 10 % over 260 billion tokens, where it stays.
            schedule=dict(
                kind="cosine",
                warmup_rows=375_000_000 // LENGTH,
                decay_rows=260_000_000_000 // LENGTH,
                final_fraction=0.1,
            ),
            compute_dtype="bfloat16",
            mesh=dict(tensor=8 if size == "175b" else 1),
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
