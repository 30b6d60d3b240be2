"""MOSS-003's supervised fine-tuning: Sun et al. 2023, README and code of OpenMOSS/MOSS.

    instar sft --config configs/sft/moss.py --workdir runs/moss/sft \\
        --config.parent=FOLDER --config.hardware=a100-8

FOLDER is moss-moon-003-base, as transformers stores it, or a run of `configs/pretrain/moss.py`; the
data set is made by `configs/data/moss.py` with the template `moss`, by which all is learnt but the
meta instruction and what tools answered. The original ran on 4 machines of 8 GPUs with 4 dialogues
on each: 128 a batch, here as many rows of 2048 tokens, which hold one or more.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/moss/16b",
            data=dict(path="runs/moss/data", sequence_length=2048),
            batch=dict(size=128),
            epochs=2.0,
            optimizer=dict(learning_rate=1.5e-5, b1=0.9, b2=0.999, weight_decay=0.1, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_fraction=0.05, final_fraction=0.0),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=256),
            evaluation=dict(every=200, rows=256),
        )
    )
