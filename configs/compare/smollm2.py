"""SmolLM2's models side by side on the openings of sentences that none has been trained on.

instar compare --config configs/compare/smollm2.py --workdir runs/smollm2/compare
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    home = "runs/smollm2"
    return ConfigDict(
        dict(
            models=dict(base=f"{home}/model", sft=f"{home}/sft", ppo=f"{home}/ppo"),
            prompts=f"{home}/demonstration/prompts/held_out.jsonl",
            judges=dict(
                vader=dict(function="instar.evaluation.judges:vader"),
                words=dict(
                    function="instar.evaluation.judges:bag_of_words",
                    arguments=dict(ratings=f"{home}/demonstration/ratings/judge.jsonl"),
                ),
            ),
            candidate="ppo",
            baseline="sft",
            reference="sft",
            base="base",
            count=128,
            max_prompt_length=12,
            max_new_tokens=28,
        )
    )
