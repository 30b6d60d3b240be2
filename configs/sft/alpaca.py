"""Alpaca 7B and 13B: Taori et al. 2023, the README of tatsu-lab/stanford_alpaca.

    instar sft --config configs/sft/alpaca.py:7b --workdir runs/alpaca/7b \\
        --config.parent=FOLDER --config.hardware=a100-8

FOLDER is LLaMA's, as transformers stores it, or a run of `configs/pretrain/llama.py`; the data set
is made by `configs/data/alpaca.py`. Published: for 7b three epochs in three hours on 8 A100 of 80
GB.

Optimiser and clip are the defaults of the transformers Trainer that the original called. Its batch
is of 128 instructions, here of 128 rows of 512 tokens, each of which holds several; a smaller
`batch.size` comes as close to it as one likes. It needed a token for padding, set to the mean of
the others; rows that are packed need none.
"""

from typing import Literal

from ml_collections import ConfigDict

# Learning rate, epochs.
SIZES = {"7b": (2e-5, 3.0), "13b": (1e-5, 5.0)}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    learning_rate, epochs = SIZES[size]
    return ConfigDict(
        dict(
            parent=f"runs/llama/{size}",
            data=dict(path="runs/alpaca/data", sequence_length=512),
            batch=dict(size=128),
            epochs=epochs,
            optimizer=dict(
                learning_rate=learning_rate, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0
            ),
            schedule=dict(kind="cosine", warmup_fraction=0.03, final_fraction=0.0),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=128),
            evaluation=dict(every=100, rows=256, prompts=("Name three primary colours.",)),
        )
    )
