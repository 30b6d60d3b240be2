"""Text from token ids one at a time, as a model generates them."""

import codecs

from instar.data.tokenizer_formats import Tokenizer


class StreamDecoder:
    """Decodes a sequence of ids while it grows.

    A character whose bytes span tokens comes out whole, with its last token. What `push` and
    `finish` returned, joined, is ``tokenizer.decode(ids)``; the work is linear in the number of
    ids. (A tokenizer.json that declares a decoder without a view in bytes, such as WordPiece's, is
    decoded by `finish` alone.)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix = tokenizer.decoded_prefix
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Returns the text that `token` completes, which is often none."""
        piece = self._tokenizer.token_bytes(token)
        if piece is None:
            self._held.append(token)
            return ""
        return self._after_prefix(self._utf8.decode(piece))

    def finish(self) -> str:
        """Returns the text still held back; U+FFFD for a character that was left incomplete."""
        if self._held:
            return self._tokenizer.decode(self._held)
        return self._after_prefix(self._utf8.decode(b"", final=True))

    def _after_prefix(self, text: str) -> str:
        if text and self._prefix:
            text, self._prefix = text.removeprefix(self._prefix), ""
        return text
