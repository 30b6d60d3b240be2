"""Vicuna 7B and 13B: Chiang et al. 2023, the README of lm-sys/FastChat.

    instar sft --config configs/sft/vicuna.py:7b --workdir runs/vicuna/7b \\
        --config.parent=FOLDER --config.hardware=a100-8

FOLDER is LLaMA's, as transformers stores it, or a run of `configs/pretrain/llama.py`; the data set
is made by `configs/data/vicuna.py`, with the template of v1.1, in which each of the assistant's
turns ends with a token that is learnt. The original had about 70,000 conversations, cut at 2048
tokens.

Optimiser and clip are the defaults of the transformers Trainer that the original called. Its batch
is of 128 conversations, here of 128 rows of 2048 tokens, which hold one or more.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(size: Literal["7b", "13b"]) -> ConfigDict:
    return ConfigDict(
        dict(
            parent=f"runs/llama/{size}",
            data=dict(path="runs/vicuna/data", sequence_length=2048),
            batch=dict(size=128),
            epochs=3.0,
            optimizer=dict(learning_rate=2e-5, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_fraction=0.03, final_fraction=0.0),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=100, rows=256, prompts=("Who are you?",)),
        )
    )
