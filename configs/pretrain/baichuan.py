"""Baichuan 7B and 13B (Baichuan Inc. 2023, the repositories' READMEs; there is no paper).

    instar pretrain --config configs/pretrain/baichuan.py:7b --workdir runs/baichuan/7b \\
        --config.hardware=a100-8

The data set, prepared for rows of 4096 tokens, is to be in runs/baichuan/data (`data.path`).
Published: sizes, vocabulary, 1.2 trillion tokens for 7b and 1.4 for 13b, and that 7b ran at 182
TFLOP/s on each of about 1000 A800, 58.3 % of their peak. 13b has linear biases in the place of
rotary positions.

Not published: learning rate, batch, schedule and optimiser. What stands here is LLaMA's for models
of the same size (`configs/pretrain/llama.py`).
"""

from typing import Literal

from ml_collections import ConfigDict

TOKENS = {"7b": 1_200_000_000_000, "13b": 1_400_000_000_000}


def get_config(size: Literal[*TOKENS]) -> ConfigDict:
    return ConfigDict(
        dict(
            data=dict(path="runs/baichuan/data", sequence_length=4096),
            model=dict(family="baichuan", size=size, vocab_size=64_000),
            tokens=TOKENS[size],
            batch=dict(size=1024),
            optimizer=dict(learning_rate=3e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_steps=2000, final_fraction=0.1),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
