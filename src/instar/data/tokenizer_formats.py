"""The formats of tokenizers: SentencePiece models, and Hugging Face's tokenizer.json."""

import functools
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from instar.data.token_bytes import bytes_reader
from instar.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
HUGGINGFACE_CONFIG = "tokenizer_config.json"

# SentencePiece writes a space as this character, inside its pieces.
_SPACE = "\u2581"

# Up to this many characters are encoded sooner than SentencePiece has started its threads.
_SHORT_BATCH = 2**13

# By what names tokenizer.json files know their special tokens, the likelier first.
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>", "[SEP]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[CLS]")
_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
      vocab_size: ids are from 0 to vocab_size - 1.
      bos_id, eos_id, pad_id: the tokens around a document and the filler behind it. A vocabulary
        without BOS or padding has its EOS stand in for them.
      special_tokens: the ids, by name, of the control tokens: those which no text encodes to and
        which decode to nothing. BOS, EOS and padding are among them.
      adds_bos: whether, by the tokenizer's own convention, a text begins with the BOS.
      decoded_prefix: what `decode` drops from the start of the text (a dummy space, or nothing).
      digest: the SHA-256 of the model file's bytes, in hexadecimal.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special_tokens: dict[str, int]
    adds_bos: bool
    decoded_prefix: str
    digest: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns int32[length] ids for each text, without BOS and EOS; uses several threads."""

    @property
    @abstractmethod
    def _bytes(self) -> Sequence[bytes] | None:
        """What `token_bytes` returns, by id."""

    @abstractmethod
    def save(self, directory: epath.PathLike) -> None:
        """Writes the tokenizer into `directory`, for `load_tokenizer`."""

    @abstractmethod
    def _find(self, token: str) -> int | None:
        """Returns the id of the vocabulary's entry `token`, None where there is none."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, without special tokens; U+FFFD for what is no UTF-8."""
        joined = b"".join([self.token_bytes(token) for token in ids])
        return joined.decode("utf-8", errors="replace").removeprefix(self.decoded_prefix)

    def token_bytes(self, token: int) -> bytes | None:
        """Returns the UTF-8 bytes, perhaps a part of a character, that a token stands for.

        Nothing for an id beyond the vocabulary, which a model with a padded one can produce. None,
        for every token alike, where the tokenizer decodes a token by its neighbours.
        """
        if self._bytes is None:
            return None
        return self._bytes[token] if token < self.vocab_size else b""

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Returns the ids of a text with control tokens in it.

        Args:
          parts: texts, each of which is encoded on its own, and ids, which stand for themselves.
        """
        parts = list(parts)
        encoded = iter(self.encode_batch([part for part in parts if isinstance(part, str)]))
        each = (next(encoded).tolist() if isinstance(part, str) else [part] for part in parts)
        return list(itertools.chain.from_iterable(each))

    def special_name(self, token: int) -> str:
        """Returns the name of the special token with the id `token`."""
        return next(name for name, special in self.special_tokens.items() if special == token)

    def token_id(self, token: str) -> int:
        """Returns the id of a token by its name, such as ``<|im_end|>``.

        Raises:
          UserError: the vocabulary has no such token.
        """
        found = self._find(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}")
        return found


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from the bytes of its file."""

    def __init__(self, model: bytes):
        """Raises ValueError where `model` is not a SentencePiece model with an EOS."""
        self.model = model
        self._processor, self.decoded_prefix = _without_dummy_prefix(model)
        processor = self._processor
        self.vocab_size = processor.get_piece_size()
        if processor.eos_id() < 0:
            raise ValueError("it has no EOS token")
        self.eos_id = processor.eos_id()
        self.adds_bos = processor.bos_id() >= 0
        self.bos_id = processor.bos_id() if self.adds_bos else self.eos_id
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        control = [piece for piece in range(self.vocab_size) if processor.is_control(piece)]
        control = sorted({*control, self.bos_id, self.eos_id, self.pad_id})
        self.special_tokens = {processor.id_to_piece(piece): piece for piece in control}
        self.digest = hashlib.sha256(model).hexdigest()
        byte_pieces = [self._find(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._literal_space = None if None in byte_pieces else byte_pieces

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts = [self._split(text) for text in texts]
        whole = list(itertools.chain.from_iterable(parts))
        if sum(map(len, whole)) > _SHORT_BATCH:
            encoded = iter(self._processor.encode(whole, num_threads=-1))
        else:  # a call with a list starts a pool of threads, which costs more than a short text
            encoded = map(self._processor.encode, whole)
        return [self._join(list(itertools.islice(encoded, len(part)))) for part in parts]

    def _split(self, text: str) -> list[str]:
        """Cuts at each U+2581, which SentencePiece itself could not tell from a space."""
        text = self.decoded_prefix + text if text else text
        return [text] if self._literal_space is None else text.split(_SPACE)

    def _join(self, parts: list[list[int]]) -> np.ndarray:
        ids = parts[0]
        for part in parts[1:]:
            ids = [*ids, *self._literal_space, *part]
        return np.array(ids, np.int32)

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        # SentencePiece's own decoding would turn a literal U+2581, come from bytes, into a space.
        return [_piece_bytes(self._processor, piece) for piece in range(self.vocab_size)]

    def save(self, directory: epath.PathLike) -> None:
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SENTENCEPIECE_FILE).write_bytes(self.model)

    def _find(self, token: str) -> int | None:
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None


def _without_dummy_prefix(model: bytes) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """Returns a processor that adds no space before a text, and the space that the model wants.

    Many models put a space before each text. Adding it ourselves gives the same ids, and lets the
    later parts of a text that is cut at U+2581 go without.
    """
    sentencepiece.SetMinLogLevel(2)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError("it is not a SentencePiece model") from error
    if not processor.encode("a", out_type=str)[0].startswith(_SPACE):
        return processor, ""
    # Two protocol buffers, one after the other, are read as one whose later fields win. This one
    # says: normalizer_spec (field 3, 2 bytes) { add_dummy_prefix (field 3): false }.
    override = b"\x1a\x02\x18\x00"
    return sentencepiece.SentencePieceProcessor(model_proto=model + override), " "


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, piece: int) -> bytes:
    """Returns the UTF-8 bytes, perhaps a part of a character, that a piece stands for."""
    name = processor.id_to_piece(piece)
    if processor.is_byte(piece):
        return bytes([int(name[1:-1], 16)])
    if processor.is_control(piece):
        return b""
    if processor.is_unknown(piece):
        return "\ufffd".encode()
    return name.replace(_SPACE, " ").encode()


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers`."""

    def __init__(self, model: bytes, special: dict[str, str] | None = None):
        """Reads a tokenizer from the bytes of its file.

        Args:
          special: the names of its special tokens by the keys "bos_token", "eos_token" and
            "pad_token", as far as they are known; others are found by their usual names.

        Raises:
          ValueError: `model` is not a tokenizer.json, or has no EOS token.
        """
        self.model = model
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"it is not a Hugging Face tokenizer ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # that is: as the text that they are
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.digest = hashlib.sha256(model).hexdigest()
        self._special = special or {}
        eos = self._special_id("eos_token", _EOS_NAMES)
        if eos is None:
            raise ValueError(
                'it has no EOS token; name it in a tokenizer_config.json ("eos_token")'
            )
        bos = self._special_id("bos_token", _BOS_NAMES)
        pad = self._special_id("pad_token", _PAD_NAMES)
        self.eos_id = eos
        self.bos_id = eos if bos is None else bos
        self.pad_id = eos if pad is None else pad
        # A file may list one of these among its plain tokens, which text could spell.
        for token in (self.bos_id, self.eos_id, self.pad_id):
            self._tokenizer.add_special_tokens([self._tokenizer.id_to_token(token)])
        self.adds_bos = self._tokenizer.encode("a").ids[:1] == [self.bos_id]
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        self.special_tokens = {name.content: token for token, name in added if name.special}
        reader = bytes_reader(json.loads(model).get("decoder"))
        self._read_bytes, self.decoded_prefix = reader or (None, "")

    def _special_id(self, key: str, usual_names: Sequence[str]) -> int | None:
        if self._special.get(key) is not None:
            return self.token_id(self._special[key])
        found = (self._find(name) for name in usual_names)
        return next((token for token in found if token is not None), None)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes is None:
            tokens = [int(token) for token in ids]
            return self._tokenizer.decode(tokens, skip_special_tokens=True)
        # Not the library, where one stray byte spoils all the byte tokens beside it.
        return super().decode(ids)

    @functools.cached_property
    def _bytes(self) -> list[bytes] | None:
        if self._read_bytes is None:
            return None
        names = map(self._tokenizer.id_to_token, range(self.vocab_size))
        return [
            b"" if name is None or name in self.special_tokens else self._read_bytes(name)
            for name in names
        ]

    def save(self, directory: epath.PathLike) -> None:
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / HUGGINGFACE_FILE).write_bytes(self.model)
        if self._special:
            (directory / HUGGINGFACE_CONFIG).write_text(json.dumps(self._special, indent=2))

    def _find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)
