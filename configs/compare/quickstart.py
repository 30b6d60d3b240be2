"""The quickstart's models side by side on the openings of sentences that none has seen.

    instar compare --config configs/compare/quickstart.py --workdir runs/quickstart/compare

Half a minute on two cores of an Intel Xeon.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    home = "runs/quickstart"
    return ConfigDict(
        dict(
            models=dict(base=f"{home}/pretrain", sft=f"{home}/sft", ppo=f"{home}/ppo"),
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
            count=1024,
            max_prompt_length=16,
            max_new_tokens=40,
        )
    )
