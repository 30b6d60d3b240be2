"""SmolLM2-135M-Instruct as the start: a reward model on people's ratings, then PPO.

    MALLOC_MMAP_MAX_=65536 launch/local.sh instar pipeline \\
        --config configs/pipeline/smollm2.py --workdir runs/smollm2 \\
        --config.stages.0.options.ratings="$(launch/local.sh ratings)" \\
        --config.stages.1.options.from="$(launch/local.sh smollm2)"

Two cores of an Intel Xeon: 53 minutes. Result, kept in benchmarks/results/smollm2.json: the
reward model has 84.8 % of held-out pairs as people order them (one person 82.7 %, a bag of words
75.4 %), 81.9 % on product reviews, 74.6 % on editorials, 81.7 % on tweets; after PPO VADER .195 is
.554 and another bag of words .30 is 1.48, at 4.6 nats from where it began, as diverse as before.
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
