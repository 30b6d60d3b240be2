"""InstructGPT's supervised fine-tuning: Ouyang et al. 2022 (2203.02155), appendix C.1.

    instar sft --config configs/sft/instructgpt.py:1.3b --workdir runs/instructgpt/sft/1.3b \\
        --config.parent=runs/gpt3/1.3b --config.hardware=h100-8

The parent is a GPT-3 of that size (6b: 6.7b of `configs/pretrain/gpt3.py`); the data set, about
13,000 demonstrations, is made by `configs/data/instructgpt.py`. Sixteen epochs, of whose
checkpoints the paper takes the one that the reward model scores highest: `keep_steps` keeps them
for that. Published: that labelers prefer the 1.3b after PPO to the 175b of GPT-3 that was not
tuned.

PPO begins with another one: two epochs with a tenth of pretraining text, which is a source of plain
text beside the dialogues and `--config.epochs=2 --config.data.weights.dialogues=0.9
--config.data.weights.text=0.1`.

Not published: weight decay and clip (here none, and 1). A batch is of so many rows of 2048 tokens,
the paper's of so many demonstrations.
"""

from typing import Literal

from ml_collections import ConfigDict

# GPT-3's size, learning rate, rows of a batch.
SIZES = {
    "1.3b": ("1.3b", 9.65e-6, 32),
    "6b": ("6.7b", 9.65e-6, 32),
    "175b": ("175b", 5.03e-6, 8),
}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    parent, learning_rate, rows = SIZES[size]
    return ConfigDict(
        dict(
            parent=f"runs/gpt3/{parent}",
            data=dict(path="runs/instructgpt/data", sequence_length=2048),
            batch=dict(size=rows),
            epochs=16.0,
            dropout=0.2,  # of the residual branches
            embedding_dropout=0.0,
            optimizer=dict(
                learning_rate=learning_rate, b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0
            ),
            schedule=dict(kind="cosine", final_fraction=0.1),
            compute_dtype="bfloat16",
            mesh=dict(tensor=8 if size == "175b" else 1),
            execution=dict(remat="attention", loss_chunk=256),
            checkpoint=dict(keep_steps=400),
            evaluation=dict(every=400),
        )
    )
