"""Dialogues with MOSS's markers for `configs/sft/moss.py`.

    instar prepare --config configs/data/moss.py --workdir runs/moss/data \\
        --config.sources.0.path=FILE --config.tokenizer.path=FOLDER

FILE holds dialogues, one a line, as {"messages": [{"role": ..., "content": ...}, ...]}; FOLDER is
the tokenizer of the model that is tuned.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(
                dict(
                    name="dialogues",
                    kind="jsonl",
                    path="runs/moss/dialogues.jsonl",
                    dialogue="messages",
                ),
            ),
            tokenizer=dict(path="runs/moss/tokenizer"),
            chat_template="moss",
            sequence_lengths=(2048,),
        )
    )
