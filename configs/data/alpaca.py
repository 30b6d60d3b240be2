"""Stanford's 52,000 instructions for `configs/sft/alpaca.py`.

    instar prepare --config configs/data/alpaca.py --workdir runs/alpaca/data \\
        --config.sources.0.path=alpaca_data.json --config.tokenizer.path=FOLDER

The file is that of tatsu-lab/stanford_alpaca on GitHub; FOLDER is the tokenizer of the model that
is tuned (a Hugging Face folder, or tokenizer.json).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(
                dict(
                    name="alpaca",
                    kind="json",
                    path="runs/alpaca/dialogues.json",
                    dialogue="alpaca",
                ),
            ),
            tokenizer=dict(path="runs/llama/tokenizer"),
            chat_template="alpaca",
            sequence_lengths=(512,),
        )
    )
