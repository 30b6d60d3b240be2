"""The best reward model of the quickstart's size: six times the labels, read twice, two networks.

    instar pipeline --config configs/pipeline/sentiment.py --workdir runs/sentiment \\
        --config.stages.0.options.ratings="$(launch/local.sh ratings)"

It pretrains for longer than the quickstart does. One core of an Intel Xeon that others used too: 48
minutes, pretraining apart. Result (benchmarks/results/sentiment.json): 77.6 % of held-out pairs as
people order them (the bag of words with the same data 77.2 %), 68.4 % on product reviews, 59.1 % on
editorials, 65.1 % on tweets.
"""

from ml_collections import ConfigDict

STAGES = (
    dict(
        name="demonstration",
        command="demonstration",
        options=dict(
            ratings=".venv/downloads/vaderSentiment-3.3.2.tar.gz",
            to="{workdir}/demonstration",
            label_pairs=60_000,
        ),
    ),
    dict(name="data", command="prepare", config="configs/data/quickstart.py"),
    dict(
        name="pretrain",
        command="pretrain",
        config="configs/pretrain/quickstart.py",
        overrides=dict(steps=1500, data=dict(path="{workdir}/data")),
    ),
    dict(name="labels", command="reward", config="configs/reward/sentiment_labels.py"),
    dict(name="reward", command="reward", config="configs/reward/sentiment.py"),
)


def get_config() -> ConfigDict:
    return ConfigDict(dict(stages=STAGES, home="runs/sentiment"))
