"""What a model whose texts begin with a prefix asks of the texts that it learns from.

In a text without a start token all is prefix, in which a token sees those that it is to predict:
the loss would fall to nothing, and nothing be learnt. So every text has to have one, before all
that is learnt of it: the chat template `chatglm` writes it, and so does the preparation of plain
texts as blanks to fill in (`instar.data.infilling`).
"""

from instar.data.chat_template import ChatTemplate
from instar.data.dataset import TokenDataset
from instar.data.dialogues import encode_dialogue
from instar.data.tokenizer import Tokenizer
from instar.errors import UserError
from instar.models.spec import ModelSpec, Prefix
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


def with_prefix_of(spec: ModelSpec, dataset: TokenDataset) -> ModelSpec:
    """The spec of a model that begins to learn, with the tokens of the data set's blanks.

    Without blanks, or without a prefix, it is as it was.
    """
    blanks = dataset.blanks
    if spec.prefix is None or blanks is None:
        return spec
    return spec.replace(prefix=Prefix(blanks.start, (blanks.long_mask, blanks.short_mask)))


def check_dataset(spec: ModelSpec, dataset: TokenDataset, data: DataConfig) -> None:
    """Sees that all texts of a data set, held-out ones too, are fit for the model.

    Raises:
      UserError: the model has no prefix, and the texts are blanks to fill in. Or it has one, and
        there are plain texts, the template marks no prefix, the blanks have other tokens, or a text
        is cut in rows of that length, where its second piece would have no prefix of its own.
    """
    blanks = dataset.blanks
    if spec.prefix is None:
        if blanks is not None:
            raise UserError(
                f"{dataset.path} is prepared with infilling, for a model whose texts begin with a "
                "prefix (ChatGLM-6B), and this one reads from left to right: prepare its texts "
                "again without, or choose another model"
            )
        return
    plain = sorted(dataset.sources.keys() - dataset.dialogues)
    if plain and blanks is None:
        raise UserError(
            "a model whose texts begin with a prefix (ChatGLM-6B) is not trained on plain texts, "
            f"which mark none, as those of source {plain[0]} in {dataset.path}: prepare them as "
            "blanks to fill in (infilling in the config of instar prepare), or choose another model"
        )
    if blanks is not None:
        _check_blanks(spec.prefix, dataset)
    if dataset.dialogues:
        template = ChatTemplate(f"of {dataset.path}", dataset.chat_template)
        check_template(spec, dataset.tokenizer, template, "the model")
    _check_whole(dataset, data.sequence_length)


def _check_blanks(prefix: Prefix, dataset: TokenDataset) -> None:
    """Raises UserError where the blanks have other tokens than the model looks for."""
    blanks = dataset.blanks
    found = (blanks.start, blanks.long_mask, blanks.short_mask)
    expected = (prefix.start_id, *prefix.mask_ids)
    if found != expected:
        raise UserError(
            f"the blanks of {dataset.path} have the start and mask tokens {found}, and the model's "
            f"are {expected}: prepare it with the names of the model's as infilling.start, "
            "infilling.long_mask and infilling.short_mask"
        )


def _check_whole(dataset: TokenDataset, length: int) -> None:
    """Raises UserError where rows of `length` tokens hold pieces of texts."""
    for name, source in dataset.sources.items():
        for split in ("train", "held_out"):
            if source.pack_index(split, length).start.any():
                raise UserError(
                    f"source {name} of {dataset.path} has texts of more than "
                    f"data.sequence_length ({length}) tokens, and a model whose texts begin with a "
                    "prefix cannot read them in pieces: take the longest of its sequence_lengths, "
                    "or prepare it for no longer ones"
                )
