"""ChatGLM-6B (THUDM 2023), after GLM (Du et al. 2022, 2103.10360).

    instar pretrain --config configs/pretrain/chatglm.py --workdir runs/chatglm/6b \\
        --config.hardware=h100-8

The data set is made by `configs/data/chatglm_texts.py`: plain texts as GLM's blanks to fill in, for
in plain text as such nothing marks the prefix that a text of this model begins with. Which tokens
do, the model is told by the data set. Dialogues come after (`configs/sft/chatglm.py`).

Published is the model, 6.17 billion parameters with the head that its code ties to the table of
tokens, and of its training: rows of 2048 tokens, about 1 trillion of them, in Chinese and English.

Not published: the shares of its blanks, learning rate, batch, schedule and optimiser. What stands
here is what GPT-3 has at 6.7 billion parameters (`configs/pretrain/gpt3.py`), without the batch's
growth.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            data=dict(path="runs/chatglm/texts", sequence_length=2048),
            model=dict(family="chatglm1", size="6b", vocab_size=130_528, tied=True),
            tokens=1_000_000_000_000,
            batch=dict(size=1024),
            optimizer=dict(learning_rate=1.2e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
            schedule=dict(kind="cosine", warmup_rows=375_000_000 // 2048, final_fraction=0.1),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=128),
            evaluation=dict(every=1000, rows=512),
        )
    )
