"""ChatGLM-6B tuned in full: THUDM 2023, ptuning/ds_train_finetune.sh of THUDM/ChatGLM-6B.

    instar sft --config configs/sft/chatglm.py --workdir runs/chatglm/sft \\
        --config.parent=FOLDER --config.hardware=a100-8

FOLDER is chatglm-6b, as its own code stores it; the data set is made by `configs/data/chatglm.py`
with the template `chatglm`. The script tunes on ADGEN: questions and answers of 64 tokens at most,
5000 steps of 48 pairs (3 GPUs, 4 on each, 4 times), a rate of 1e-4 that falls linearly to 0 without
a warm-up, Adam and clip as the transformers Trainer has them. Here a batch is of 48 rows of 128
tokens.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/chatglm/6b",
            data=dict(path="runs/chatglm/data", sequence_length=128),
            batch=dict(size=48),
            steps=5000,
            optimizer=dict(learning_rate=1e-4, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0),
            schedule=dict(kind="linear", final_fraction=0.0),
            compute_dtype="bfloat16",
            execution=dict(remat="attention"),
            evaluation=dict(every=1000, rows=256),
        )
    )
