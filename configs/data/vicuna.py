"""Conversations in ShareGPT's form for `configs/sft/vicuna.py`; Vicuna's own were not released.

    instar prepare --config configs/data/vicuna.py --workdir runs/vicuna/data \\
        --config.sources.0.path=sharegpt.json --config.tokenizer.path=FOLDER

FOLDER is the tokenizer of the model that is tuned (a Hugging Face folder, or tokenizer.json).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(
                dict(
                    name="vicuna",
                    kind="json",
                    path="runs/vicuna/dialogues.json",
                    dialogue="sharegpt",
                ),
            ),
            tokenizer=dict(path="runs/llama/tokenizer"),
            chat_template="vicuna",
            sequence_lengths=(2048,),
        )
    )
