"""The bytes of a file, local or remote, unpacked as they come.

Two kinds of trouble are told apart here. Damage is a property of the file (`DamagedFile`): what
came before it is good, and whoever reads can note it and go on with the next file. A failure of the
disk or the network is not: it is passed on as it is, lest good text be skipped for it.
"""

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import zstandard
from etils import epath

from instar.errors import UserError

# Packed bytes read at once: gzip unpacks one to at most about a thousand.
_CHUNK = 1 << 18


class DamagedFile(Exception):
    """A file whose rest cannot be read, however often one tries."""


# By suffix, what makes a decompressor of one member (gzip) or frame (Zstandard).
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: the gzip format
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def read_chunks(path: epath.PathLike) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked where its name ends in .gz or .zst.

    Raises:
      DamagedFile: it is not in the format of its name, or ends in the middle.
      OSError: it cannot be read.
    """
    path = epath.Path(path)
    with path.open("rb") as stream:
        packed = iter(partial(stream.read, _CHUNK), b"")
        if path.suffix in DECOMPRESSORS:
            yield from _unpack(packed, DECOMPRESSORS[path.suffix])
        else:
            yield from packed


def _unpack(packed: Iterable[bytes], decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Unpacks any number of members or frames, one after the other."""
    state = None
    for chunk in packed:
        while chunk:
            state = state or decompressor()
            try:
                yield state.decompress(chunk)
            except (zlib.error, zstandard.ZstdError) as error:
                raise DamagedFile(f"the file is damaged ({error})") from error
            if not state.eof:
                break
            chunk, state = state.unused_data, None
    if state is not None:
        raise DamagedFile("the file ends in the middle")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of `chunks` with their ``\\n``; the last one may have none."""
    pieces: list[bytes] = []
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*pieces, line, b"\n"])
            pieces = []
        if rest:
            pieces.append(rest)
    if pieces:
        yield b"".join(pieces)


@contextlib.contextmanager
def explained(path: epath.PathLike, field: str) -> Iterator[None]:
    """Turns what can go wrong on the way to a file into one sentence.

    Args:
      field: what the sentence calls the setting that names the file.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{path} needs a package that is not installed ({error}): install Instar with the "
            'extra "cloud"'
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: check {field}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder: name a file of it in {field}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): check its permissions") from error


def file_digest(path: epath.PathLike, field: str) -> str:
    """Returns the SHA-256 of a file's bytes as they are stored, in hexadecimal.

    Args:
      field: what errors call the setting that names the file.

    Raises:
      UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    with explained(path, field), epath.Path(path).open("rb") as stream:
        for chunk in iter(partial(stream.read, _CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()
