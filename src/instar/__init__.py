"""Instar: language-model training in JAX."""

from typing import Any

__version__ = "0.1.0"


def load(path: Any, **options: Any) -> Any:
    """Loads a model: see `instar.interchange.loading.load`, which is imported when it is needed."""
    from instar.interchange.loading import load

    return load(path, **options)
