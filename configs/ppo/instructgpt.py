"""InstructGPT's PPO-ptx in three sizes: Ouyang et al. 2022 (2203.02155), section 3.5, appendix C.4.

    instar ppo --config configs/ppo/instructgpt.py:1.3b --workdir runs/instructgpt/ppo/1.3b \\
        --config.hardware=h100-8

Its data are to be in runs/instructgpt: `prompts/train.jsonl`, about 31,000 prompts, and
`prompts/held_out.jsonl`; the parent is the second fine-tuning of `configs/sft/instructgpt.py`,
reward model and critic are the 6b of `configs/reward/instructgpt.py`, and pretraining text for rows
of 2048 tokens is in runs/gpt3/data. 256,000 episodes: 500 iterations of 512 responses in 8 updates,
each response once. Each update adds the gradient of 8 times as many rows of pretraining text,
weighted 27.8. Published: labelers prefer 175b to GPT-3 in 85 +- 3 % of comparisons, and 1.3b to
GPT-3 of 175b; without the pretraining text a rate above 8.05e-6 diverged; the best KL coefficients
are .01 to .02.

Not published: the policy's learning rate that was used in the end (here 5e-6), lambda of the
advantages (here .95), weight decay and clip (here none, and 1).
"""

from typing import Literal

from ml_collections import ConfigDict

# The critic's learning rate.
SIZES = {"1.3b": 9e-6, "6b": 9e-6, "175b": 5e-6}


def get_config(size: Literal[*SIZES]) -> ConfigDict:
    home, adam = "runs/instructgpt", dict(b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    return ConfigDict(
        dict(
            parent=f"{home}/sft_with_text/{size}",
            chat_template="plain",
            reward=dict(model=f"{home}/reward"),
            prompts=dict(
                path=f"{home}/prompts/train.jsonl",
                held_out=f"{home}/prompts/held_out.jsonl",
                max_length=1024,
            ),
            response=dict(max_new_tokens=1024, temperature=1.0),
            batch=dict(size=512, microbatch=8),
            steps=500,
            update=dict(
                beta=0.02,
                gamma=1.0,
                lam=0.95,
                clip=0.2,
                epochs=1,
                minibatch=64,
                ptx_coefficient=27.8,
            ),
            ptx=dict(data=dict(path="runs/gpt3/data", sequence_length=2048), rows=512),
            ema=0.992,
            optimizer=dict(learning_rate=5e-6, **adam),
            schedule=dict(kind="constant", warmup_steps=10),  # from a tenth on
            critic=dict(
                optimizer=dict(learning_rate=SIZES[size], **adam), schedule=dict(kind="constant")
            ),
            compute_dtype="bfloat16",
            mesh=dict(tensor=8 if size == "175b" else 1),
            execution=dict(remat="attention", loss_chunk=256),
        )
    )
