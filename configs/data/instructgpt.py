"""Demonstrations for `configs/sft/instructgpt.py`; InstructGPT's own were not released.

    instar prepare --config configs/data/instructgpt.py --workdir runs/instructgpt/data \\
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
                    path="runs/instructgpt/dialogues.jsonl",
                    dialogue="messages",
                ),
            ),
            tokenizer=dict(path="runs/gpt3/tokenizer"),
            chat_template="plain",
            sequence_lengths=(2048,),
        )
    )
