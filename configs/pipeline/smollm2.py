"""SmolLM2-135M-Instruct as the start: a reward model on people's ratings, then PPO.

    instar pipeline --config configs/pipeline/smollm2.py --workdir runs/smollm2 \\
        --config.stages.0.options.ratings="$(launch/local.sh ratings)" \\
        --config.stages.1.options.from="$(launch/local.sh smollm2)"
"""

from ml_collections import ConfigDict

STAGES = (
    dict(
        name="demonstration",
        command="demonstration",
        options=dict(
            ratings=".venv/downloads/vaderSentiment-3.3.2.tar.gz", to="{workdir}/demonstration"
        ),
    ),
    dict(
        name="model",
        command="import",
        options={"from": "SmolLM2-135M-Instruct.Q4_1.gguf", "to": "{workdir}/model"},
    ),
    dict(name="dialogues", command="prepare", config="configs/data/smollm2_dialogues.py"),
    dict(name="sft", command="sft", config="configs/sft/smollm2.py"),
    dict(name="reward", command="reward", config="configs/reward/smollm2.py"),
    dict(name="ppo", command="ppo", config="configs/ppo/smollm2.py"),
    dict(name="compare", command="compare", config="configs/compare/smollm2.py"),
)


def get_config() -> ConfigDict:
    return ConfigDict(dict(stages=STAGES, home="runs/smollm2"))
