"""Named arrays in files, read one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from instar.families.layout import Shape


@dataclass(frozen=True)
class StoredTensor:
    """One array of a file: `read()` brings it into memory, or maps it where that is possible."""

    shape: Shape
    read: Callable[[], np.ndarray]


StoredTensors = Mapping[str, StoredTensor]
