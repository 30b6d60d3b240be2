"""Baichuan 2 7B and 13B: Yang et al. 2023 (2309.10305), section 2.

    instar pretrain --config configs/pretrain/baichuan2.py:7b --workdir runs/baichuan2/7b \\
        --config.hardware=a100-8

The data set, prepared for rows of 4096 tokens, is to be in runs/baichuan2/data (`data.path`).
Published: 2.6 trillion tokens on 1024 A800, above 180 TFLOP/s on each. Its own are a head whose
rows are divided by their norms (NormHead, of the family), the max-z loss of 2e-4 on the largest
logit, and a clip of .5.

Not published: the batch (here 4 million tokens, as LLaMA's) and where the cosine ends (here 10 %).
"""

from typing import Literal

from ml_collections import ConfigDict

LEARNING_RATES = {"7b": 2e-4, "13b": 1.5e-4}


def get_config(size: Literal[*LEARNING_RATES]) -> ConfigDict:
    return ConfigDict(
        dict(
            data=dict(path="runs/baichuan2/data", sequence_length=4096),
            model=dict(family="baichuan", size=f"2-{size}", vocab_size=125_696),
            tokens=2_600_000_000_000,
            batch=dict(size=1024),
            max_z_loss=2e-4,
            optimizer=dict(
                learning_rate=LEARNING_RATES[size],
                b1=0.9,
                b2=0.95,
                weight_decay=0.1,
                clip_norm=0.5,
            ),
            schedule=dict(kind="cosine", warmup_steps=2000, final_fraction=0.1),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
