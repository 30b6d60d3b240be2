"""InstructGPT's reward model: Ouyang et al. 2022 (2203.02155), section 3.5 and appendix C.2.

    instar reward --config configs/reward/instructgpt.py --workdir runs/instructgpt/reward \\
        --config.hardware=h100-8

Its data are to be in runs/instructgpt: `rankings/train.jsonl`, about 33,000 prompts, each with the
ranking of 4 to 9 completions ({"prompt", "completions", "ranks"}), `rankings/held_out.jsonl`
likewise, and `demonstrations.jsonl` ({"prompt", "completion"}). One network of 6 billion parameters
serves policies of all sizes. All completions of a prompt are one element of a batch of 64 prompts;
one epoch, since more overfit; in the end the scores are moved so that demonstrations score 0 on
average. Published: 72.4 +- .4 % of held-out comparisons by its own labelers right, 69.6 +- .9 % of
other labelers', who agree with one another in 77.3 +- 1.3 %.

The original began with a GPT-3 that was tuned on public NLP data sets, and found much the same from
the fine-tuned model, which is the parent here. Not published: weight decay and clip (here none, and
1), and the length of a prompt with its completion (here that of PPO, 2048 tokens).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    home = "runs/instructgpt"
    return ConfigDict(
        dict(
            parent=f"{home}/sft/6b",
            chat_template="plain",
            data=dict(
                path=f"{home}/rankings/train.jsonl",
                kind="rankings",
                completions=9,
                max_length=2048,
            ),
            batch=dict(size=64, microbatch=8),
            epochs=1.0,
            optimizer=dict(learning_rate=9e-6, b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0),
            schedule=dict(kind="cosine", final_fraction=0.1),
            compute_dtype="bfloat16",
            execution=dict(remat="attention"),
            normalise=dict(kind="demonstrations", path=f"{home}/demonstrations.jsonl"),
            evaluation=dict(every=100, sets=dict(held_out=f"{home}/rankings/held_out.jsonl")),
        )
    )
