"""Between the tensors of a foreign checkpoint and our tree of parameters, one array at a time."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from instar.errors import UserError
from instar.families.layout import Layout, Placed, Shape
from instar.interchange.tensors import StoredTensors
from instar.models.language_model import LanguageModel, Params
from instar.models.spec import ModelSpec

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """One entry of a stacked parameter: the part `part` of a tensor."""

    placed: Placed
    part: str


@dataclass(frozen=True)
class ForeignParameter:
    """A parameter of ours that lies in a foreign checkpoint.

    `pieces` are the entries of its first `stacked` dimensions, the last of them running fastest;
    where none is, there is one, the whole of it.
    """

    shape: Shape
    stacked: int
    pieces: tuple[Piece, ...]
    stored: StoredTensors

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part of the parameter that `index` (a slice for each dimension) selects."""
        if not self.stacked:
            return np.ascontiguousarray(self._piece(0)[index].astype(dtype))
        outer, inner = index[: self.stacked], index[self.stacked :]
        numbers = np.arange(len(self.pieces)).reshape(self.shape[: self.stacked])[outer]
        result: np.ndarray | None = None
        for row, number in enumerate(numbers.flat):
            piece = self._piece(number)[inner]
            if result is None:
                result = np.empty((numbers.size, *piece.shape), dtype)
            result[row] = piece
        return result.reshape(*numbers.shape, *result.shape[1:])

    def _piece(self, number: int) -> np.ndarray:
        placed, part = self.pieces[number].placed, self.pieces[number].part
        return placed.tensor.read(self.stored[placed.name].read(), part, placed.sizes)


def match(
    layout: Layout, model: LanguageModel, stored: StoredTensors, source: object
) -> dict[str, ForeignParameter]:
    """Finds each parameter of `model` among the tensors of a checkpoint, by dotted path.

    Args:
      source: the checkpoint, as errors name it.

    Raises:
      UserError: a tensor is missing, has another shape, or is one too many.
    """
    stored = _with_prefix(layout, stored, model.spec)
    pieces: dict[str, list[Piece]] = {}
    for placed in layout.tensors(model.spec):
        _check(placed, stored, source)
        for part in placed.tensor.parts:
            pieces.setdefault(placed.stem + part, []).append(Piece(placed, part))
    _check_surplus(layout, stored, model.spec, source)
    shapes = flatten(model.shapes)
    if pieces.keys() != shapes.keys():
        raise ValueError(f"the layout does not place {sorted(pieces.keys() ^ shapes.keys())}")

    def parameter(path: str) -> ForeignParameter:
        stacked = len(pieces[path][0].placed.index)
        return ForeignParameter(shapes[path].shape, stacked, tuple(pieces[path]), stored)

    return {path: parameter(path) for path in shapes}


def _with_prefix(layout: Layout, stored: StoredTensors, spec: ModelSpec) -> StoredTensors:
    """The tensors by the layout's names, also where those of a bare model lack its prefix."""
    if not layout.prefix or any(name.startswith(layout.prefix) for name in stored):
        return stored
    full = {placed.name for placed in layout.tensors(spec)}
    return {name if name in full else layout.prefix + name: t for name, t in stored.items()}


def _check(placed: Placed, stored: StoredTensors, source: object) -> None:
    if placed.name not in stored:
        raise UserError(f"{source} lacks the tensor {placed.name}")
    expected, found = placed.tensor.shape(placed.sizes), stored[placed.name].shape
    if expected != found:
        raise UserError(
            f"{source}: {placed.name} has the shape {list(found)}, and its config asks for "
            f"{list(expected)}"
        )


def _check_surplus(layout: Layout, stored: StoredTensors, spec: ModelSpec, source: object) -> None:
    known = {placed.name for placed in layout.tensors(spec)}
    for name in stored:
        if name not in known and not layout.ignores(name, stored, spec):
            raise UserError(
                f"{source} holds the tensor {name}, which no part of this model is made from"
            )


def load_params(
    parameters: dict[str, ForeignParameter],
    dtype: np.dtype,
    sharding_of: Callable[[str], jax.sharding.Sharding],
) -> Params:
    """Reads each parameter straight into its sharding; one at a time is in the host's memory."""

    def load(path: str, parameter: ForeignParameter) -> jax.Array:
        array = jax.make_array_from_callback(
            parameter.shape, sharding_of(path), lambda index: parameter.read(index, dtype)
        )
        return array.block_until_ready()

    return unflatten((path, load(path, parameter)) for path, parameter in parameters.items())


def tensors_to_write(
    layout: Layout, spec: ModelSpec, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The way out: each tensor of a foreign checkpoint, made from our parameters.

    Args:
      read: the parameter of a path; called once for each, and a parameter is forgotten once the
        tensors that hold it are made.
    """
    alike = itertools.groupby(
        sorted(layout.tensors(spec), key=lambda placed: (placed.stem, placed.tensor.name)),
        key=lambda placed: (placed.stem, placed.tensor.name),
    )
    for _, group in alike:
        rows = list(group)
        parts = [read(rows[0].stem + part) for part in rows[0].tensor.parts]
        for placed in rows:
            own = [part[placed.index] for part in parts]
            yield placed.name, placed.tensor.write(own, placed.sizes)


def flatten(tree: Params) -> dict:
    """A nested dict as one whose keys are dotted paths."""
    return {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(items: Iterable[tuple[str, object]]) -> Params:
    """The reverse of `flatten`."""
    tree: dict = {}
    for path, leaf in items:
        *above, last = path.split(".")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
