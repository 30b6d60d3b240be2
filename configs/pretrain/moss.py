"""The base model of MOSS-003, 16.7 billion parameters (Sun et al. 2023, the repository's README).

    instar pretrain --config configs/pretrain/moss.py --workdir runs/moss/16b \\
        --config.hardware=h100-64

The data set, prepared for rows of 2048 tokens, is to be in runs/moss/data (`data.path`). Published:
700 billion tokens of Chinese, English and code, 6.67e22 FLOP. The original began with the weights
of CodeGen-16B (Nijkamp et al. 2022), this file begins with fresh ones.

Not published: learning rate, batch, schedule and optimiser. What stands here is what GPT-3 has at
13 billion parameters (`configs/pretrain/gpt3.py`), without the batch's growth.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            data=dict(path="runs/moss/data", sequence_length=2048),
            model=dict(family="moss", size="16b", vocab_size=107_008),
            tokens=700_000_000_000,
            batch=dict(size=1024),
            optimizer=dict(learning_rate=1e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_rows=375_000_000 // 2048, final_fraction=0.1),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=1000, rows=512),
        )
    )
