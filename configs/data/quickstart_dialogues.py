"""The demonstration's dialogues: openings of film-review sentences, and how people went on.

    instar demonstration --ratings "$(launch/local.sh ratings)" --to runs/quickstart/demonstration
    instar prepare --config configs/data/quickstart_dialogues.py --workdir runs/quickstart/dialogues

The first takes 15 s on 2 CPU cores, the second 4 s. Result: 8,774 training dialogues and 183
held-out ones of 301,983 tokens in all, no record skipped, 189 left out of the rows as longer than
one. What is rated by people and held out from all training is not among them.
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
