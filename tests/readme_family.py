"""The family that the README adds, as a user adds it: a file of its own beside the others."""

import importlib
import pathlib
import re

from instar import families
from instar.families import registry

README = pathlib.Path(__file__).parents[1] / "README.md"


def source() -> str:
    """The worked example."""
    section = README.read_text().split("## Add a family")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def added(monkeypatch, folder: pathlib.Path) -> None:
    """Adds the family for the time of a test."""
    (folder / "stablelm.py").write_text(source())
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    importlib.invalidate_caches()
    for name, family in registry.find_families().items():
        monkeypatch.setitem(registry.FAMILIES, name, family)
