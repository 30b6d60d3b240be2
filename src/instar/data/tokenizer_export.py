"""Tokenizers for Hugging Face's transformers: a folder that its AutoTokenizer reads.

A SentencePiece model is converted to the tokenizer.json of the `tokenizers` library. Its vocabulary
there spells a space as a space, not as U+2581 as SentencePiece does, so that a text's own U+2581
stays apart from it.
"""

import json
import re

import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from instar.data.tokenizer_formats import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_FILE,
    SentencePieceTokenizer,
    Tokenizer,
)
from instar.errors import UserError

_SPACE = "\u2581"
_Model = sentencepiece_model_pb2.ModelProto
_Piece = _Model.SentencePiece
_Trainer = sentencepiece_model_pb2.TrainerSpec


def save_for_transformers(
    tokenizer: Tokenizer, directory: epath.PathLike, chat_template: str | None = None
) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where there is one, tokenizer.model.

    What ``AutoTokenizer.from_pretrained(directory)`` makes of them gives the ids of our `encode`
    (called with ``add_special_tokens=False``) for any text that spells no special token, decodes
    them to the same text and has the same special tokens. The exceptions:

    - Transformers finds special tokens in text, as `encode` by design does not.
    - It decodes an unknown character to nothing, not to U+FFFD.
    - Where a unigram model finds the same pieces in two orders equally likely (a long run of spaces
      as 16 + 8 or 8 + 16), SentencePiece's rounding to 32 bits decides, and that to 64 bits there.
    - A SentencePiece model with both a dummy prefix and user-defined pieces gets the prefix after
      such a piece as well.

    A SentencePiece model with a BOS puts it before a text when transformers adds special tokens, as
    our training does.

    Args:
      chat_template: a Jinja source for ``apply_chat_template``.

    Raises:
      UserError: a SentencePiece model normalises text, or is neither BPE nor unigram.
    """
    directory = epath.Path(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        converted = huggingface_from_sentencepiece(tokenizer.model).to_str()
        tokenizer.save(directory)
        (directory / HUGGINGFACE_FILE).write_text(converted)
    else:
        tokenizer.save(directory)
    config = {
        # In transformers 5 this is another name of its TokenizersBackend.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.special_name(tokenizer.bos_id),
        "eos_token": tokenizer.special_name(tokenizer.eos_id),
        "pad_token": tokenizer.special_name(tokenizer.pad_id),
        "clean_up_tokenization_spaces": False,
    }
    if unknown := _unknown_token(directory / HUGGINGFACE_FILE):
        config["unk_token"] = unknown
    if chat_template is not None:
        config["chat_template"] = chat_template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / HUGGINGFACE_CONFIG).write_text(text)


def _unknown_token(path: epath.Path) -> str | None:
    """Returns the name that a tokenizer.json gives to what its vocabulary cannot spell."""
    model = json.loads(path.read_text())["model"]
    if "unk_id" in model:
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def huggingface_from_sentencepiece(model: bytes) -> tokenizers.Tokenizer:
    """Converts a SentencePiece model, from the bytes of its file.

    Raises:
      UserError: the model normalises text, or is neither BPE nor unigram.
    """
    proto = _Model.FromString(model)
    if proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces:
        raise UserError(
            f"the SentencePiece model normalises text ({proto.normalizer_spec.name}), which has no "
            "exact tokenizer.json; train one with normalization_rule_name=identity and "
            "remove_extra_whitespaces=false"
        )
    kind = proto.trainer_spec.model_type
    if kind not in _MODELS:
        raise UserError(
            f"a SentencePiece model of type {_Trainer.ModelType.Name(kind)} has no tokenizer.json; "
            "use bpe or unigram"
        )
    tokenizer = tokenizers.Tokenizer(_MODELS[kind](proto))
    prefixed = proto.normalizer_spec.add_dummy_prefix
    steps = [] if proto.trainer_spec.byte_fallback else [normalizers.Replace(_SPACE, " ")]
    steps += [normalizers.Prepend(" ")] if prefixed else []
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if kind == _Trainer.UNIGRAM:
        tokenizer.pre_tokenizer = _apart(proto)
    stripped = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *stripped])
    for piece in proto.pieces:
        if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.USER_DEFINED):
            special = piece.type != _Piece.USER_DEFINED
            added = tokenizers.AddedToken(_spelled(piece), normalized=False, special=special)
            tokenizer.add_tokens([added])
    bos = proto.trainer_spec.bos_piece
    if proto.trainer_spec.bos_id >= 0:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, proto.trainer_spec.bos_id)],
        )
    return tokenizer


def _spelled(piece: _Piece) -> str:
    """Returns the text that a piece stands for, or the name of one that stands for none."""
    is_text = piece.type in (_Piece.NORMAL, _Piece.USER_DEFINED)
    return piece.piece.replace(_SPACE, " ") if is_text else piece.piece


def _unknown(proto: _Model) -> int:
    kinds = [piece.type for piece in proto.pieces]
    return kinds.index(_Piece.UNKNOWN)


def _bpe(proto: _Model) -> models.BPE:
    """Makes merges of a BPE's pieces.

    SentencePiece joins whichever neighbours make the piece of the highest score. So each way to cut
    a piece in two is a merge, and the merges are in the order of the pieces' scores.
    """
    vocab = {_spelled(piece): index for index, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == _Piece.NORMAL]
    parts = {_spelled(piece) for piece in normal}
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = _spelled(piece)
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        merges += [(left, right) for left, right in cuts if left in parts and right in parts]
    return models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=proto.pieces[_unknown(proto)].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: _Model) -> models.Unigram:
    """Takes over a unigram model's pieces and their log probabilities."""
    return models.Unigram(
        [(_spelled(piece), piece.score) for piece in proto.pieces],
        _unknown(proto),
        proto.trainer_spec.byte_fallback,
    )


def _apart(proto: _Model) -> pre_tokenizers.PreTokenizer:
    """Cuts the spelling of each piece that stands for no text after its first character.

    The unigram model of `tokenizers` would find these pieces, such as ``<0x0A>``, in text.
    """
    names = [
        _spelled(p) for p in proto.pieces if p.type not in (_Piece.NORMAL, _Piece.USER_DEFINED)
    ]
    spellings = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names]
    return pre_tokenizers.Split(tokenizers.Regex("|".join(spellings)), "isolated")


_MODELS = {_Trainer.BPE: _bpe, _Trainer.UNIGRAM: _unigram}
