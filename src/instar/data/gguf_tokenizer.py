"""A tokenizer from the metadata of a GGUF file, the format of llama.cpp.

The keys are those of the GGUF specification, ``tokenizer.ggml.*``:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping, Sequence

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, processors

from instar.data.tokenizer_formats import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from instar.errors import UserError

# The kinds of tokens, numbered as SentencePiece numbers those of its pieces.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_SINGLE_DIGITS = (r"\p{N}", *_GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (_LLAMA3[0].replace(r"\p{N}{1,3}", r"\p{N}"),)

# Which expressions cut a text, one after the other, before its pieces are merged: llama.cpp's
# names for them and its rules (src/llama-vocab.cpp).
_PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """Builds the tokenizer that a GGUF file carries.

    Args:
      metadata: the file's keys and values as plain Python values (str, int, float, bool and lists
        of them); keys that are no tokenizer's are ignored.

    Raises:
      UserError: a key is missing, or names a tokenizer or a pre-tokenizer that is not known.
    """
    kind = _get(metadata, "model", str)
    if kind not in _BUILDERS:
        raise UserError(
            f"tokenizer.ggml.model={kind!r} is not supported; the file's must be one of "
            + ", ".join(sorted(_BUILDERS))
        )
    tokens = _list(metadata, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise UserError("tokenizer.ggml.tokens names a token twice; convert the file again")
    special = _special_ids(metadata, tokens)
    try:
        return _BUILDERS[kind](metadata, tokens, special)
    except ValueError as error:
        raise UserError(f"the file's tokenizer.ggml.* cannot be used: {error}") from None


def _get(metadata: Mapping[str, object], name: str, kind: type) -> object:
    """Returns a value of the type `kind`."""
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise UserError(f"the GGUF file has no {key}; it carries no tokenizer that can be read")
    value = metadata[key]
    if not isinstance(value, kind):
        raise UserError(f"{key} must be a {kind.__name__}, not a {type(value).__name__}")
    return value


def _list(metadata: Mapping[str, object], name: str, kind: type) -> list:
    """Returns a list of values of the type `kind`."""
    values = _get(metadata, name, list)
    wrong = next((index for index, value in enumerate(values) if not isinstance(value, kind)), None)
    if wrong is not None:
        raise UserError(
            f"tokenizer.ggml.{name}[{wrong}] must be a {kind.__name__}, "
            f"not a {type(values[wrong]).__name__}"
        )
    return values


def _each(metadata: Mapping[str, object], name: str, kind: type, tokens: Sequence[str]) -> list:
    """Returns a list that has one value for each token."""
    values = _list(metadata, name, kind)
    if len(values) != len(tokens):
        raise UserError(
            f"tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens; "
            "convert the file again"
        )
    return values


def _special_ids(metadata: Mapping[str, object], tokens: Sequence[str]) -> dict[str, int]:
    """Returns the ids of BOS, EOS, unknown and padding, as far as the file says them."""
    ids = {}
    for short, name in (
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("unk", "unknown_token_id"),
        ("pad", "padding_token_id"),
    ):
        if f"tokenizer.ggml.{name}" not in metadata:
            continue
        ids[short] = _get(metadata, name, int)
        if not 0 <= ids[short] < len(tokens):
            raise UserError(
                f"tokenizer.ggml.{name}={ids[short]} is not among the {len(tokens)} tokens; "
                "convert the file again"
            )
    if "eos" not in ids:
        raise UserError("the GGUF file has no tokenizer.ggml.eos_token_id; add it to the file")
    return ids


def _byte_level_bpe(
    metadata: Mapping[str, object], tokens: list[str], special: dict[str, int]
) -> HuggingFaceTokenizer:
    """Builds a tokenizer.json from a vocabulary and merges in GPT-2's alphabet of bytes."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise UserError(
            f"tokenizer.ggml.pre={name!r} is not a known pre-tokenizer; known are "
            + ", ".join(sorted(_PRE_TOKENIZERS))
        )
    expressions = _PRE_TOKENIZERS[name]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(metadata, tokens),
            # LLaMA 3's vocabulary has words that its merges do not lead to.
            ignore_merges=expressions is _LLAMA3,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _each(metadata, "token_type", int, tokens)
    control = {index for index, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN)}
    for index, token in enumerate(tokens):
        if index in control or types[index] == _USER_DEFINED:
            added = tokenizers.AddedToken(token, normalized=False, special=index in control)
            tokenizer.add_tokens([added])
    names = {f"{short}_token": tokens[index] for short, index in special.items()}
    # What a file does not say, llama.cpp takes to be so for LLaMA 3 alone.
    if "bos" in special and metadata.get("tokenizer.ggml.add_bos_token", expressions is _LLAMA3):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{names['bos_token']} $A",
            special_tokens=[(names["bos_token"], special["bos"])],
        )
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), names)


def _merges(metadata: Mapping[str, object], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that are joined, the first ones first."""
    known = set(tokens)
    merges = []
    for index, merge in enumerate(_list(metadata, "merges", str)):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise UserError(
                f"tokenizer.ggml.merges[{index}]={merge!r} does not join two tokens to a third; "
                "convert the file again"
            )
        merges.append((left, right))
    return merges


def _sentencepiece(
    metadata: Mapping[str, object], tokens: list[str], special: dict[str, int]
) -> SentencePieceTokenizer:
    """Builds a SentencePiece model; pieces, scores and types are the file's, one to one.

    The file says a BPE's scores only: which of SentencePiece's algorithms it is, llama.cpp does not
    ask, for it merges by score.
    """
    model = sentencepiece_model_pb2.ModelProto()
    scores = _each(metadata, "scores", float, tokens)
    types = _each(metadata, "token_type", int, tokens)
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.byte_fallback = _BYTE in types
    trainer.vocab_size = len(tokens)
    for short in ("bos", "eos", "unk", "pad"):
        index = special.get(short, -1)
        setattr(trainer, f"{short}_id", index)
        if index >= 0:
            setattr(trainer, f"{short}_piece", tokens[index])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    return SentencePieceTokenizer(model.SerializeToString())


_BUILDERS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
