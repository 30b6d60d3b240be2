"""What lies in the folder of a checkpoint, and how each part is read and written by itself.

- `params/`: the model's parameters, each array sharded as it lies on the mesh, readable on any
  other;
- `state/`: the rest of the `TrainState`, likewise (not for a model that was imported);
- `model/model.json`: what the parameters are of: the spec, the tokenizer, the chat template;
- `input/input.json`: where the input goes on;
- `config/config.json`: the resolved config of the run;
- `lineage/lineage.json`: stage, parent, tokenizer, data, tokens seen, fingerprints.

Orbax writes and reads the arrays.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from instar.workdir import read_json, write_json

ARRAY_ITEMS = ("params", "state")
JSON_ITEMS = ("model", "input", "config", "lineage")
CHECKPOINTS = "checkpoints"

# Of a large array, what is read at once: more than one reader then shares the work.
CHUNK_BYTES = 128 * 2**20


def absolute(path: epath.PathLike) -> epath.Path:
    """The path as TensorStore needs it; one with a scheme (gs://) already is absolute."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def read_item(folder: epath.Path, name: str) -> Any:
    """One of `JSON_ITEMS`.

    Raises:
      UserError: it is not there, or not JSON.
    """
    return read_json(folder / name / f"{name}.json")


def read_arrays(folder: epath.Path, name: str, template: Any) -> Any:
    """One of `ARRAY_ITEMS`, laid out and typed as `template` is."""
    handler = ocp.StandardCheckpointHandler()
    return handler.restore(folder / name, args=ocp.args.StandardRestore(template))


def read_parameter(folder: epath.Path, path: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> Any:
    """One of the parameters, whole, as a NumPy array."""

    def nested(value: Any) -> Any:
        for name in reversed(path):
            value = {name: value}
        return value

    args = ocp.args.PyTreeRestore(
        item=nested(shape),
        restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    (leaf,) = jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(folder / "params", args=args))
    return leaf


# --- Writing what is not in memory --------------------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """An array that is made when it is its turn to be written, and forgotten afterwards."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _StreamedHandler(type_handlers.NumpyHandler):
    """Writes one `Streamed` after the other, each as the NumPy array that it makes."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values: list, infos: list, args: list | None = None) -> list:
        for each in zip(values, infos, args, strict=True):
            await self._write(*each)
        return []

    async def _write(self, value: Streamed, info: Any, arg: Any) -> None:
        # A call of its own: what it holds is let go of before the next array is made.
        for written in await super().serialize([value.make()], [info], [arg]):
            await asyncio.to_thread(written.result)


def write_model(folder: epath.Path, params: Any, items: Mapping[str, Any]) -> None:
    """Writes a checkpoint of `Streamed` parameters.

    Args:
      folder: the checkpoint's own; is made.
      items: of `JSON_ITEMS`, by name; a callable is asked after the parameters are written.
    """
    folder.mkdir(parents=True)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=type_handlers.create_type_handler_registry(
            (Streamed, _StreamedHandler()),
            (jax.Array, type_handlers.ArrayHandler()),  # without it Orbax warns
        )
    )
    save_args = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(params, save_args=save_args)
        checkpointer.save(folder / "params", args=args)
    for name, value in items.items():
        (folder / name).mkdir()
        write_json(folder / name / f"{name}.json", value() if callable(value) else value)


def newest(workdir: epath.Path) -> Iterator[epath.Path]:
    """The checkpoints of a run, the newest first."""
    folder = workdir / CHECKPOINTS
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    yield from sorted(steps, key=lambda path: -int(path.name))
