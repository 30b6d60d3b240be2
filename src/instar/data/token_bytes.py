"""The bytes that the tokens of a tokenizer.json stand for, read from the decoder that it declares.

A token may hold a part of a character only, so that its bytes are the finest view of it: text can
then be put together token by token.
"""

import re
from collections.abc import Callable

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself, the others of the 256 bytes are the characters from U+0100
    on (Radford et al. 2019, GPT-2's `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def bytes_reader(decoder: dict | None) -> tuple[Callable[[str], bytes], str] | None:
    """Returns how a decoder turns a token into bytes, and the prefix that it drops from the text.

    Args:
      decoder: the field "decoder" of a tokenizer.json.

    Returns:
      None for a decoder whose text of a token depends on its neighbours, as WordPiece's does.
    """
    steps = _steps(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, ""
    if "ByteFallback" not in kinds:
        return None
    replaced, prefix = [], ""
    for kind, step in zip(kinds, steps, strict=True):
        if kind == "Replace" and set(step["pattern"]) == {"String"}:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and step["start"] in (0, 1) and step["stop"] == 0:
            prefix = step["content"] * step["start"]
        elif kind not in ("ByteFallback", "Fuse"):
            return None

    def byte_fallback(token: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return byte_fallback, prefix


def _steps(decoder: dict | None) -> list[dict]:
    """Returns the decoders that a decoder consists of, one after the other."""
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return decoder["decoders"]


_ALPHABET = byte_alphabet()


def _byte_level(token: str) -> bytes:
    # An added token is spelled as it is; one character outside the alphabet tells.
    if all(character in _ALPHABET for character in token):
        return bytes([_ALPHABET[character] for character in token])
    return token.encode()
