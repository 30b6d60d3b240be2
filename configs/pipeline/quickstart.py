"""The quickstart as one chain: film reviews, people's ratings of sentences, a small model.

    instar pipeline --config configs/pipeline/quickstart.py --workdir runs/quickstart \\
        --config.stages.0.options.ratings="$(launch/local.sh ratings)"

Two cores of an Intel Xeon that others use too: 12:06 and 13:16 minutes, which
`launch/local.sh quickstart` takes too.
"""

from ml_collections import ConfigDict

STAGES = (
    dict(
        name="demonstration",
        command="demonstration",
        options=dict(
            ratings=".venv/downloads/vaderSentiment-3.3.2.tar.gz",
            to="{workdir}/demonstration",
            label_pairs=10_000,
        ),
    ),
    dict(name="data", command="prepare", config="configs/data/quickstart.py"),
    dict(name="pretrain", command="pretrain", config="configs/pretrain/quickstart.py"),
    dict(name="dialogues", command="prepare", config="configs/data/quickstart_dialogues.py"),
    dict(name="sft", command="sft", config="configs/sft/quickstart.py"),
    dict(name="labels", command="reward", config="configs/reward/quickstart_labels.py"),
    dict(name="reward", command="reward", config="configs/reward/quickstart.py"),
    dict(name="ppo", command="ppo", config="configs/ppo/quickstart.py"),
    dict(name="compare", command="compare", config="configs/compare/quickstart.py"),
)


def get_config() -> ConfigDict:
    return ConfigDict(dict(stages=STAGES, home="runs/quickstart"))
