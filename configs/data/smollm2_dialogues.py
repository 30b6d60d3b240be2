"""The demonstration's dialogues in the tokens of SmolLM2-135M-Instruct.

Prepared by `configs/pipeline/smollm2.py`, which imports that model first.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(
                dict(
                    name="sentences",
                    kind="jsonl",
                    path="runs/smollm2/demonstration/dialogues.jsonl",
                    dialogue="messages",
                ),
            ),
            tokenizer=dict(path="runs/smollm2/model/tokenizer"),
            chat_template="plain",
            sequence_lengths=(64,),
            held_out=0.02,
        )
    )
