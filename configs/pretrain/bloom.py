"""BLOOM in its six sizes: BigScience 2022 (2211.05100), table 3, and the scripts it was run by.

    instar pretrain --config configs/pretrain/bloom.py:560m --workdir runs/bloom/560m \\
        --config.hardware=a100-8

The data set, prepared for rows of 2048 tokens, is to be in runs/bloom/data (`data.path`); the
vocabulary of 250,680 is padded to 250,880. Published: 176b took 3.5 months on 384 A100 of 80 GB, at
about 150 TFLOP/s a GPU with the recomputed forward pass counted.

All that is counted in rows is as in the scripts (train/tr11-176B-ml of
bigscience-workshop/bigscience on GitHub): samples of warm-up, decay and the growing batch. The
smaller models were trained in float16 with a scaled loss, the largest, as all here, in bfloat16.
Its GPUs lay as tensor 4 x pipeline 12 x data 8; here there is no pipeline, and `mesh` makes groups
of 8 of `tensor`.

The microbatch, 16 rows, is what the batch grows by: for up to 16 devices or groups of them. On
more, set it, `batch.ramp.start` and `batch.ramp.increment` higher.

Large sizes set `mesh.tensor`, which no preset of `hardware` reckons with: leave that out there, and
`mesh.fsdp` takes the other devices.
"""

from typing import Literal

from ml_collections import ConfigDict

# Rows of a batch, by how many it grows, the learning rate's peak and end, and the tokens.
SIZES = {
    "560m": (256, 16, 3e-4, 1e-5, 341_000_000_000),
    "1.1b": (256, 16, 2.5e-4, 1e-5, 341_000_000_000),
    "1.7b": (512, 16, 2e-4, 1e-5, 341_000_000_000),
    "3b": (512, 32, 1.6e-4, 1e-5, 341_000_000_000),
    "7.1b": (512, 32, 1.2e-4, 1e-5, 341_000_000_000),
    "176b": (2048, 16, 6e-5, 6e-6, 366_000_000_000),
}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    rows, increment, peak, end, tokens = SIZES[size]
    return ConfigDict(
        dict(
            data=dict(path="runs/bloom/data", sequence_length=2048),
            model=dict(family="bloom", size=size, vocab_size=250_880),
            initialization=dict(scheme="gpt3", std=0.0048),
            tokens=tokens,
            batch=dict(
                size=rows,
                microbatch=16,
                ramp=dict(start=192, increment=increment, rows=9_765_625),
            ),
            optimizer=dict(
                learning_rate=peak,
                b1=0.9,
                b2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
            # Over more tokens, 410 billion, than were trained on.
            schedule=dict(
                kind="cosine",
                warmup_rows=183_105,
                decay_rows=200_000_000,
                final_fraction=end / peak,
            ),
            compute_dtype="bfloat16",
            mesh=dict(tensor=8 if size == "176b" else 1),
            execution=dict(remat="attention", loss_chunk=128),
            evaluation=dict(every=1000, rows=512),
        )
    )
