"""Epochs over a set in memory: each has an order of its own, and starts anywhere at no cost."""

import numpy as np

from instar.data.permutation import derive_keys, permute


def shuffled_epochs(
    seed: int, first: int, count: int, size: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """The places `first` to `first` + `count` - 1 of an endless run over range(size).

    Each is a pure function of its number, so that a run can start anywhere.

    Args:
      purpose: what is shuffled; sets with the same seed and size are then in different orders.

    Returns:
      (epochs, items), int64 [count] each: in each epoch every item comes once.
    """
    epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), size)
    items = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        items[chosen] = permute(places[chosen], size, derive_keys(seed, purpose, int(epoch)))
    return epochs, items
