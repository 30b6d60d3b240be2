"""What a model whose texts begin with a prefix asks of the texts that it learns from.

In a text without a start token all is prefix, in which a token sees those that it is to predict:
the loss would fall to nothing, and nothing be learnt. So every text has to have one, before all
that is learnt of it.
"""

from instar.data.chat_template import ChatTemplate
from instar.data.dataset import TokenDataset
from instar.data.dialogues import encode_dialogue
from instar.data.tokenizer import Tokenizer
from instar.errors import UserError
from instar.models.spec import ModelSpec
from instar.stages.config import DataConfig

# Of one round, and of several.
PROBE = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
]


def check_template(
    spec: ModelSpec, tokenizer: Tokenizer, template: ChatTemplate, reader: str
) -> None:
    """Sees that a chat template marks the prefixes of a model that has any.

    Args:
      reader: what the error calls the model.

    Raises:
      UserError: in some text it does not write the start token once, behind a mask token and as the
        last of what a model is given when it answers, or a target stands before it.
    """
    if spec.prefix is None:
        return
    start, masks = spec.prefix.start_id, set(spec.prefix.mask_ids)
    for text in encode_dialogue(tokenizer, template, PROBE):
        ids = text.ids.tolist()
        place = ids.index(start) if start in ids else -1
        marked = ids.count(start) == 1 and masks & set(ids[:place])
        if not marked or text.begins != (place + 1,) or text.targets[:place].any():
            raise UserError(
                f"{reader} reads texts that begin with a prefix (ChatGLM-6B), and the chat "
                f"template does not end it with the token {start} behind one of {sorted(masks)} "
                "where the assistant answers: take the template chatglm, with the model's own "
                "tokenizer"
            )


def check_dataset(spec: ModelSpec, dataset: TokenDataset, data: DataConfig) -> None:
    """Sees that all texts of a data set, held-out ones too, are fit for a model with a prefix.

    Raises:
      UserError: there are texts that are no dialogues, the template marks no prefix, or a dialogue
        is cut in rows of that length, where its second piece would have no prefix of its own.
    """
    if spec.prefix is None:
        return
    plain = [name for name, source in dataset.sources.items() if source.targets is None]
    if plain:
        raise UserError(
            "a model whose texts begin with a prefix (ChatGLM-6B) is not trained on plain texts, "
            f"which mark none, as those of source {plain[0]} in {dataset.path}: prepare dialogues "
            "alone and go on with instar sft, or choose another model"
        )
    template = ChatTemplate(f"of {dataset.path}", dataset.chat_template)
    check_template(spec, dataset.tokenizer, template, "the model")
    length = data.sequence_length
    for name, source in dataset.sources.items():
        for split in ("train", "held_out"):
            if source.pack_index(split, length).start.any():
                raise UserError(
                    f"source {name} of {dataset.path} has dialogues of more than "
                    f"data.sequence_length ({length}) tokens, and a model whose texts begin with a "
                    "prefix cannot read them in pieces: take the longest of its sequence_lengths, "
                    "or prepare it for no longer ones"
                )
