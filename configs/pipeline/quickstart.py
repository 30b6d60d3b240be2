"""The quickstart as one chain: film reviews, people's ratings of sentences, a small model.

    instar pipeline --config configs/pipeline/quickstart.py --workdir runs/quickstart \\
        --config.stages.0.options.ratings="$(launch/local.sh ratings)"
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
    dict(name="data", command="prepare", config="configs/data/quickstart.py"),
    dict(
        name="pretrain",
        command="pretrain",
        config="configs/pretrain/quickstart.py",
        overrides=dict(data=dict(path="{workdir}/data")),
    ),
)


def get_config() -> ConfigDict:
    return ConfigDict(dict(stages=STAGES))
