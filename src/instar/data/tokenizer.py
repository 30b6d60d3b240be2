"""Text to token ids and back.

Two promises. Text survives: ``decode(encode(text)) == text`` for any Unicode text (of a tokenizer
that was made elsewhere this holds as far as its own normalisation allows). And text cannot pose as
control: no text encodes to a BOS, an EOS or a chat token, so that a document or a user that writes
``<|im_end|>`` ends nothing. Such ids come by name only, from `Tokenizer.special_tokens`.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import sentencepiece
from etils import epath

from instar.data.tokenizer_formats import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from instar.errors import UserError

__all__ = ["CHAT_TOKENS", "Tokenizer", "TokenizerConfig", "load_tokenizer", "train_tokenizer"]

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>")

# SentencePiece skips, or complains about, training text with NUL or U+2585. A newline is a token of
# its own and U+2581 is encoded by bytes, so that no piece crosses either.
_NOT_IN_PIECES = re.compile("[\n\0\u2581\u2585]")
# SentencePiece's BPE trainer counts the characters of a word in 16 bits.
_LONGEST_SENTENCE = 4096

# pad, bos, eos, unk and the newline.
_BASIC_TOKENS = 5
_BYTE_TOKENS = 256


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a data set gets.

    Attributes:
      path: an existing tokenizer, a SentencePiece .model or a Hugging Face tokenizer.json. None
        trains one by the other fields, which are otherwise without effect.
      kind: the SentencePiece algorithm.
      vocab_size: the number of tokens, special and byte tokens included.
      reserved: how many control tokens ``<|reserved_0|>`` ... to keep for later use.
      train_bytes: how much text to train on, in UTF-8 bytes, line ends not counted.
    """

    path: str | None = None
    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = 4096
    reserved: int = 16
    train_bytes: int = 50_000_000

    def check(self) -> None:
        """Raises UserError for values that no tokenizer can have."""
        if self.path == "":
            raise UserError("tokenizer.path is empty; name a file, or leave it None to train one")
        if self.reserved < 0:
            raise UserError(f"tokenizer.reserved must be at least 0, not {self.reserved}")
        if not 1 <= self.train_bytes <= 1_000_000_000:
            # The unigram trainer's suffix array indexes with 32 bits.
            raise UserError(
                f"tokenizer.train_bytes must be from 1 to 1,000,000,000, not {self.train_bytes}"
            )
        least = _BASIC_TOKENS + len(CHAT_TOKENS) + self.reserved + _BYTE_TOKENS + 1
        if self.vocab_size < least:
            raise UserError(
                f"tokenizer.vocab_size must be at least {least} (256 byte tokens, the special ones "
                f"and {self.reserved} reserved ones), not {self.vocab_size}"
            )


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Loads a SentencePiece .model, a tokenizer.json, or the directory that `save` wrote.

    Raises:
      UserError: there is no such file, or it is not a tokenizer.
    """
    path = epath.Path(path)
    if path.is_dir():
        # A folder may hold both; then tokenizer.json is the one that knows the added tokens.
        names = (HUGGINGFACE_FILE, SENTENCEPIECE_FILE)
        files = [path / name for name in names if (path / name).exists()]
        if not files:
            raise UserError(f"tokenizer {path} has neither {names[1]} nor {names[0]}")
        path = files[0]
    try:
        model = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"tokenizer {path} does not exist") from None
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error}") from None
    try:
        if path.suffix != ".json":
            return SentencePieceTokenizer(model)
        return HuggingFaceTokenizer(model, _special_tokens(path.parent / HUGGINGFACE_CONFIG))
    except (ValueError, UserError) as error:
        raise UserError(f"tokenizer {path} cannot be used: {error}") from None


def _special_tokens(path: epath.Path) -> dict[str, str]:
    """Returns the names of the special tokens in a Hugging Face tokenizer_config.json."""
    if not path.exists():
        return {}
    config = json.loads(path.read_text())
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def train_tokenizer(
    texts: Iterable[str], config: TokenizerConfig, control: Iterable[str] = ()
) -> Tokenizer:
    """Trains a SentencePiece tokenizer on the first ``config.train_bytes`` bytes of `texts`.

    The same texts and config give the same tokenizer, byte for byte. `control` are the names of
    further control tokens, which count among ``config.vocab_size``.

    Raises:
      UserError: the text is too little, or too varied, for ``config.vocab_size``.
    """
    reserved = tuple(f"<|reserved_{index}|>" for index in range(config.reserved))
    named = dict.fromkeys((*CHAT_TOKENS, *reserved, *control))
    # A list, for SentencePiece would wrap an exception that reading the texts raises in its own.
    sentences = list(_sentences(texts, config.train_bytes))
    if not sentences:
        raise UserError("there is no text to train a tokenizer on; check the sources")
    model = io.BytesIO()
    sentencepiece.SetMinLogLevel(2)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
            control_symbols=list(named),
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _LONGEST_SENTENCE,
            num_threads=16,  # not the machine's: unigram's sums depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), config) from error
    return SentencePieceTokenizer(model.getvalue())


def _sentences(texts: Iterable[str], train_bytes: int) -> Iterator[str]:
    """Yields lines of at most `_LONGEST_SENTENCE` characters until there are `train_bytes`."""
    left = train_bytes
    for text in texts:
        for line in _NOT_IN_PIECES.split(text):
            for start in range(0, len(line), _LONGEST_SENTENCE):
                sentence = line[start : start + _LONGEST_SENTENCE]
                yield sentence
                left -= len(sentence.encode())
                if left <= 0:
                    return


def _training_error(message: str, config: TokenizerConfig) -> Exception:
    """Says what SentencePiece's own message means for the config."""
    size = f"tokenizer.vocab_size={config.vocab_size}"
    if most := re.search(r"value <= (\d+)", message):
        return UserError(
            f"{size} is too large for this little text: give at most {most[1]}, or more text"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"{size} is too small for the characters of this text: give at least {least[1]}"
        )
    return RuntimeError(message)
