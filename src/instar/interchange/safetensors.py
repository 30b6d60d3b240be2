"""The safetensors format: a header of JSON, then the arrays one after the other.

Read by mapping the file and written array by array, so that a model never has to fit in memory.
The library of the format writes only what it is given whole. The format: 8 bytes with the length
of the header (little-endian), the header `{"name": {"dtype", "shape", "data_offsets"}}`, the bytes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from instar.errors import UserError
from instar.families.layout import Shape
from instar.interchange.tensors import StoredTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# More is no header but a file of another kind.
_LONGEST_HEADER = 100_000_000


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder: of its index where it has one, else of its single file.

    Raises:
      UserError: a file is missing, truncated, or no safetensors file; the folder has pickles only.
    """
    index = folder / INDEX
    if index.exists():
        return _open_index(index)
    if (folder / SINGLE).exists():
        return open_file(folder / SINGLE)
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickles:
        raise UserError(
            f"{folder} holds its weights as pickles only ({', '.join(pickles[:3])}), which can run "
            "any code when they are read: convert them to safetensors on a machine that may run it "
            "(save_pretrained of transformers does), and import that"
        )
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _open_index(index: Path) -> dict[str, StoredTensor]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors files") from None
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}, which is not a file beside it")
        if not (index.parent / name).exists():
            raise UserError(f"{index} names {name}, which is not there")
        tensors |= open_file(index.parent / name)
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise UserError(f"{index} names the tensor {missing[0]}, which none of its files holds")
    return tensors


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
      UserError: the file is truncated, or no safetensors file.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{path} is truncated, or no safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file: its header is no mapping")
    start = 8 + length
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: _stored(path, name, entry, start, size) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: Mapping, start: int, size: int) -> StoredTensor:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        valid = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"{path}: the header's entry of {name} is not valid")
    if kind not in DTYPES:
        raise UserError(f"{path}: {name} is of type {kind}, which is not supported")
    dtype = DTYPES[kind]
    count = math.prod(shape)
    if end - begin != count * dtype.itemsize:
        raise UserError(f"{path}: {name} has {end - begin} bytes, which is not its shape {shape}")
    if start + end > size:
        raise UserError(
            f"{path} is truncated: {name} ends at byte {start + end} of {size}; fetch it again"
        )

    def read() -> np.ndarray:
        if not count:
            return np.zeros(shape, dtype)
        mapped = np.memmap(path, np.uint8, "r", offset=start + begin, shape=(end - begin,))
        return mapped.view(dtype).reshape(shape)

    return StoredTensor(shape, read)


class FolderWriter:
    """Writes the tensors of a model in any order, each as soon as it is there.

    The files, of at most `largest_file` bytes each, get their final names when all is written, and
    an index where they are several.

    Args:
      shapes: that of each tensor, by name, in the order in which they are to lie in the files.
      dtype: that of all of them.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Shape],
        dtype: np.dtype,
        largest_file: int = 5_000_000_000,
    ):
        self._folder, self._shapes, self._dtype = folder, shapes, dtype
        self._places: dict[str, tuple[Path, int]] = {}
        shards = list(self._shards(largest_file))
        for number, names in enumerate(shards, 1):
            several = f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._lay_out(SINGLE if len(shards) == 1 else several, names)

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _shards(self, largest_file: int) -> Iterator[list[str]]:
        shard: list[str] = []
        for name in self._shapes:
            if shard and sum(map(self._bytes, [*shard, name])) > largest_file:
                yield shard
                shard = []
            shard.append(name)
        yield shard

    def _lay_out(self, file_name: str, names: list[str]) -> None:
        """Makes a file with its header, as long as it will be."""
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            begin, end = end, end + self._bytes(name)
            header[name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = self._folder / file_name
        with _partial(path).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name in names:
            self._places[name] = path, 8 + len(text) + header[name]["data_offsets"][0]

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor."""
        if array.shape != tuple(self._shapes[name]):
            raise ValueError(f"{name} was announced as {self._shapes[name]} and is {array.shape}")
        path, offset = self._places[name]
        contiguous = np.ascontiguousarray(array.astype(self._dtype, copy=False))
        with _partial(path).open("r+b") as file:
            file.seek(offset)
            file.write(contiguous.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Gives the files their names."""
        paths = sorted({path for path, _ in self._places.values()})
        for path in paths:
            _partial(path).replace(path)
        if len(paths) > 1:
            places = {name: path.name for name, (path, _) in self._places.items()}
            total = sum(map(self._bytes, self._shapes))
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
