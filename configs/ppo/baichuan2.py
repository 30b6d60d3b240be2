"""PPO of Baichuan 2 7B and 13B Chat: Yang et al. 2023 (2309.10305), section 3.

    instar ppo --config configs/ppo/baichuan2.py:7b --workdir runs/baichuan2/ppo/7b \\
        --config.hardware=a100-8

The parent is the fine-tuned model, runs/baichuan2/sft/7b, the reward model
runs/baichuan2/reward/7b; prompts are to be in runs/baichuan2/prompts. From the paper: 350
iterations, 20 before them in which the critic alone learns, a constant rate of 5e-6 for both,
gradients clipped to .5, ratios to .1, and a KL coefficient that falls from .2 to .005 (how is not
said: here linearly, over all iterations).

Not published: responses of an iteration and of an update, epochs, lengths, gamma and lambda, weight
decay, beginning of the critic. What stands here is Instar's default, or a guess.
"""

from typing import Literal

from ml_collections import ConfigDict


def get_config(size: Literal["7b", "13b"]) -> ConfigDict:
    home, warmup = "runs/baichuan2", 20
    adam = dict(learning_rate=5e-6, b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=0.5)
    return ConfigDict(
        dict(
            parent=f"{home}/sft/{size}",
            chat_template="baichuan2",
            reward=dict(model=f"{home}/reward/{size}"),
            prompts=dict(
                path=f"{home}/prompts/train.jsonl",
                held_out=f"{home}/prompts/held_out.jsonl",
                max_length=1024,
            ),
            response=dict(max_new_tokens=1024),
            batch=dict(size=512, microbatch=8),
            steps=warmup + 350,
            update=dict(
                beta=0.2,
                beta_decay=dict(final=0.005, iterations=warmup + 350),
                clip=0.1,
                epochs=1,
                minibatch=64,
                critic_warmup=warmup,
            ),
            optimizer=dict(adam),
            schedule=dict(kind="constant"),
            critic=dict(optimizer=dict(adam), schedule=dict(kind="constant")),
            compute_dtype="bfloat16",
            execution=dict(remat="attention", loss_chunk=256),
        )
    )
