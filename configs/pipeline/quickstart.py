"""The quickstart as one chain: film reviews, and a small model pretrained on them.

instar pipeline --config configs/pipeline/quickstart.py --workdir runs/quickstart
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            stages=(
                dict(name="data", command="prepare", config="configs/data/quickstart.py"),
                dict(
                    name="pretrain",
                    command="pretrain",
                    config="configs/pretrain/quickstart.py",
                    overrides=dict(data=dict(path="{workdir}/data")),
                ),
            ),
        )
    )
