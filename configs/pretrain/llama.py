"""LLaMA 1 to 3 in all sizes; "2-" and "3-" in front of a size is the generation.

    instar pretrain --config configs/pretrain/llama.py:7b --workdir runs/llama/7b \\
        --config.hardware=h100-64

The data set, prepared for the rows of the generation, is to be in runs/llama/data (`data.path`).

- LLaMA (Touvron et al. 2023, 2302.13971, table 2): rows of 2048 tokens. Published: 82,432 hours of
  an A100 for 7b, 135,168 for 13b, 530,432 for 33b, 1,022,362 for 65b (2048 of them for 21 days).
- LLaMA 2 (2307.09288, section 2.2): rows of 4096, 2 trillion tokens. That of 34b was not released.
- Llama 3 (2407.21783, table 3 and section 3.4.1): rows of 8192, a vocabulary of 128,256. Published
  for 405b alone are the 8000 steps of warm-up, the decay to 1 % over 1,200,000 steps, and the
  batch: 8 million tokens, and 16 million from the 2.87 trillionth on (here the doubling of
  `batch.ramp`); its first 252 million tokens were in rows of half the length and batches of 4
  million, which is left out. For 8b and 70b warm-up and end are those of 405b, the batch of 8
  million tokens and the decay over the whole run are assumed. Weight decay and clip are not
  published: those of LLaMA 2.

The others have batches of 4 million tokens and cosines to 10 % after 2000 steps of warm-up.

Large sizes set `mesh.tensor`, which no preset of `hardware` reckons with: leave that out there, and
`mesh.fsdp` takes the other devices.
"""

from typing import Literal

from ml_collections import ConfigDict

# Peak of the learning rate, tokens.
SIZES = {
    "7b": (3e-4, 1_000_000_000_000),
    "13b": (3e-4, 1_000_000_000_000),
    "33b": (1.5e-4, 1_400_000_000_000),
    "65b": (1.5e-4, 1_400_000_000_000),
    "2-7b": (3e-4, 2_000_000_000_000),
    "2-13b": (3e-4, 2_000_000_000_000),
    "2-34b": (1.5e-4, 2_000_000_000_000),
    "2-70b": (1.5e-4, 2_000_000_000_000),
    "3-8b": (3e-4, 15_000_000_000_000),
    "3-70b": (1.5e-4, 15_000_000_000_000),
    "3-405b": (8e-5, 15_600_000_000_000),
}
# Of each generation: the length of a row, and the rows of 4 or 8 million tokens.
ROWS = {"1": (2048, 2048), "2": (4096, 1024), "3": (8192, 1024)}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    learning_rate, tokens = SIZES[size]
    generation = size[0] if "-" in size else "1"
    length, rows = ROWS[generation]
    batch, schedule = dict(size=rows), dict(kind="cosine", warmup_steps=2000, final_fraction=0.1)
    if generation == "3":
        schedule |= dict(warmup_steps=8000, final_fraction=0.01)
    if size == "3-405b":
        first = 2_870_000_000_000 // length
        batch = dict(
            size=2 * rows, microbatch=rows, ramp=dict(start=rows, increment=rows, rows=first)
        )
        schedule |= dict(decay_steps=1_200_000)
    return ConfigDict(
        dict(
            data=dict(path="runs/llama/data", sequence_length=length),
            model=dict(
                family="llama", size=size, vocab_size=128_256 if generation == "3" else 32_000
            ),
            tokens=tokens,
            batch=batch,
            optimizer=dict(
                learning_rate=learning_rate,
                b1=0.9,
                b2=0.95,
                epsilon=1e-5 if generation == "2" else 1e-8,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
            schedule=schedule,
            compute_dtype="bfloat16",
            mesh=dict(tensor=8 if size.endswith(("33b", "34b", "65b", "70b", "405b")) else 1),
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
