"""The quickstart's models before a third judge, which is fifty times as large as they are.

    instar compare --config configs/compare/quickstart_by_smollm2.py \\
        --workdir runs/quickstart/compare_by_smollm2

The judge is the reward model of `configs/pipeline/smollm2.py`, which runs before. Two cores of an
Intel Xeon: a minute and a half. Result, of 256 openings: -.04 (-.14 to .06) after SFT and .62 (.51
to .73) after PPO, which wins 72 % of the time.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    home = "runs/quickstart"
    return ConfigDict(
        dict(
            models=dict(base=f"{home}/pretrain", sft=f"{home}/sft", ppo=f"{home}/ppo"),
            prompts=f"{home}/demonstration/prompts/held_out.jsonl",
            judges=dict(
                smollm2=dict(
                    function="instar.evaluation.reward_judge:reward_model",
                    arguments=dict(path="runs/smollm2/reward"),
                ),
            ),
            candidate="ppo",
            baseline="sft",
            reference="sft",
            base="base",
            count=256,
            max_prompt_length=16,
            max_new_tokens=40,
        )
    )
