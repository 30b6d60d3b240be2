"""Plain texts as blanks to fill in for `configs/pretrain/chatglm.py`: GLM's objective.

    instar prepare --config configs/data/chatglm_texts.py --workdir runs/chatglm/texts \\
        --config.sources.0.path=FOLDER --config.tokenizer.path=TOKENIZER

FOLDER holds JSON lines, {"text": ...}; TOKENIZER is that of the model, which has [gMASK], [MASK],
<sop> and <eop> as special tokens. With `--config.tokenizer.path=None` one is trained that has them.

Published, of GLM-130B (Zeng et al. 2022, 2210.02414, section 2.2): [MASK] in 30 % of the training
sequences, for spans of Poisson(3) tokens that add up to 15 % of one, and in the other 70 % [gMASK],
for all behind a place that is uniform. Not published: what ChatGLM-6B was trained on, and in which
shares. What differs here: a text has one blank, so that short ones are a smaller part of what is
learnt (see `instar.data.infilling`), and there are no instructions among the texts (5 % of
GLM-130B's tokens).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            sources=(dict(name="texts", kind="jsonl", path="runs/chatglm/corpus"),),
            tokenizer=dict(path="runs/chatglm/tokenizer", vocab_size=65_536),
            infilling=dict(short_share=0.3),
            sequence_lengths=(2048,),
        )
    )
