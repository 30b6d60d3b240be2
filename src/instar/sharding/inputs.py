"""From the rows of a step to arrays on the mesh, and from arrays on the mesh to the host."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from instar.errors import UserError
from instar.sharding.rules import (
    RULES,
    axes_told,
    batch_sharding,
    batch_shards,
    replicated,
    row_sharding,
)


def zigzag(length: int, parts: int) -> np.ndarray:
    """The order in which the `length` tokens of a row are laid along `parts` devices: int [length].

    Of 2 * parts equal pieces, device i gets pieces i and 2 * parts - 1 - i. A token sees those
    before it, so that with pieces in their own order the last device would have most of the work of
    attention; with one from either end all have the same (Llama 3, 2407.21783, section 3.3.2).
    """
    pieces = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([pieces[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def check_row_length(mesh: Mesh, length: int, name: str) -> None:
    """Raises UserError where `zigzag` cannot lay out rows of `length` tokens, called `name`."""
    parts = mesh.shape["context"]
    if parts > 1 and length % (2 * parts):
        raise UserError(
            f"{name} ({length}) must be a multiple of 2 * mesh.context = {2 * parts}, since each "
            "of its devices takes two pieces of a row"
        )


@dataclass(frozen=True)
class BatchLayout:
    """How the rows of a step become microbatches, and which of them this process reads.

    Row i of a step is row i % `microbatch` of microbatch i // `microbatch`. Arrays are
    [microbatches, microbatch, sequence], split over the mesh along their second and third
    dimensions, the tokens of a row in the order `zigzag` where those are on several devices; a step
    with fewer rows fills the first microbatches and leaves the rest zero.
    """

    mesh: Mesh
    microbatches: int
    microbatch: int

    def check(self) -> None:
        """Raises UserError where a microbatch does not divide over the mesh."""
        shards = batch_shards(self.mesh)
        if self.microbatch % shards:
            raise UserError(
                f"a microbatch of {self.microbatch} rows cannot be split evenly over "
                f"{axes_told(self.mesh, RULES['batch'])} = {shards}: make batch.microbatch a "
                "multiple of it"
            )

    def local_rows(self) -> np.ndarray:
        """The rows of each microbatch that this process's devices hold, int [n], ascending."""
        index_map = batch_sharding(self.mesh).addressable_devices_indices_map((self.microbatch,))
        rows = {row for index in index_map.values() for row in range(self.microbatch)[index[0]]}
        return np.asarray(sorted(rows))

    def local_offsets(self, count: int) -> np.ndarray:
        """Which of the `count` rows of a step this process reads, in the order `place` expects."""
        starts = np.arange(0, count, self.microbatch)
        return (starts[:, None] + self.local_rows()).reshape(-1)

    def place(self, rows: dict[str, np.ndarray], count: int) -> dict[str, jax.Array]:
        """This process's rows [local, sequence] of a step of `count` rows, as global arrays.

        Adds `microbatches` (int32), the number of microbatches that hold rows.
        """
        sharding = row_sharding(self.mesh, leading=1)
        filled, local = count // self.microbatch, self.local_rows()
        missing, parts = self.microbatches - filled, self.mesh.shape["context"]

        def array(values: np.ndarray) -> jax.Array:
            values = values.reshape(filled, len(local), -1)
            values = np.pad(values, ((0, missing), (0, 0), (0, 0)))
            if parts > 1:
                values = values[:, :, zigzag(values.shape[2], parts)]

            def piece(index: tuple[slice, slice, slice]) -> np.ndarray:
                wanted = np.arange(self.microbatch)[index[1]]
                return values[:, np.searchsorted(local, wanted), index[2]]

            shape = (self.microbatches, self.microbatch, values.shape[2])
            return jax.make_array_from_callback(shape, sharding, piece)

        placed = {name: array(values) for name, values in rows.items()}
        number = jax.device_put(jnp.int32(filled), replicated(self.mesh))
        return placed | {"microbatches": number}


def place_rows(mesh: Mesh, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch [B] or [B, sequence] that every process holds whole, split over the mesh.

    The tokens of a row stay in their order.
    """

    def array(values: np.ndarray) -> jax.Array:
        sharding = row_sharding(mesh) if values.ndim > 1 else batch_sharding(mesh)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return {name: array(values) for name, values in rows.items()}


def fetch(arrays: Any) -> Any:
    """A pytree of arrays, however they lie on the mesh, as NumPy arrays; every process must ask."""

    def whole(array: jax.Array) -> jax.Array | np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return array
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.device_get(jax.tree.map(whole, arrays))
