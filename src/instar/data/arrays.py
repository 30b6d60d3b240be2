"""Named arrays in one uncompressed .npz file, which is never seen half-written."""

from collections.abc import Mapping

import numpy as np
from etils import epath


def save_arrays(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays` by way of a rename; equal arrays give equal bytes."""
    partial = path.parent / f"{path.name}.partial"
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def load_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote; nothing in the file is executed."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
