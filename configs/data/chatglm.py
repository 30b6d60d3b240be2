"""Dialogues as ChatGLM-6B reads them for `configs/sft/chatglm.py`.

    instar prepare --config configs/data/chatglm.py --workdir runs/chatglm/data \\
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
                    path="runs/chatglm/dialogues.jsonl",
                    dialogue="messages",
                ),
            ),
            tokenizer=dict(path="runs/chatglm/tokenizer"),
            chat_template="chatglm",
            sequence_lengths=(128,),
        )
    )
