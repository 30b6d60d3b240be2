"""The demonstration's dialogues: openings of film-review sentences, and how people went on.

    instar demonstration --ratings "$(launch/local.sh ratings)" --to runs/quickstart/demonstration
    instar prepare --config configs/data/quickstart_dialogues.py --workdir runs/quickstart/dialogues

The first takes 15 s on 2 CPU cores, the second 3 s. Result: 8,592 training dialogues of 282,454
tokens in all, 176 held-out ones of 6,123 tokens, no record skipped, 189 of the 8,957 left out as
longer than a row. What is rated by people and held out from all training is not
among them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(
                dict(
                    name="sentences",
                    kind="jsonl",
                    path="runs/quickstart/demonstration/dialogues.jsonl",
                    dialogue="messages",
                ),
            ),
            # That of the pretrained model, which goes on from it.
            tokenizer=dict(path="runs/quickstart/data/tokenizer"),
            chat_template="plain",
            sequence_lengths=(64,),
            held_out=0.02,
        )
    )
