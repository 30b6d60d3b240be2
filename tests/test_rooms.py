"""The rooms of src/instar and which of them each may import, read from the source."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

import instar

ROOT = pathlib.Path(instar.__file__).parent

# What every room may use: the two ways of failing, and configs.
COMMONS = {"errors", "config", "schema"}

BELOW_EVALUATION = {
    *("models", "families", "sharding", "data", "objectives", "training", "generation"),
}

# Each room and the rooms (or modules beside them) that it may import, itself and the commons aside.
MAY_IMPORT = {
    "models": set(),
    "objectives": set(),
    "data": {"workdir"},
    "families": {"models"},
    "sharding": {"models"},
    "training": {"models", "objectives", "sharding", "workdir"},
    "generation": {"models", "sharding"},
    "reinforcement": {"models", "sharding", "objectives", "training", "generation"},
    "interchange": BELOW_EVALUATION | {"workdir"},
    "serving": {"data", "generation", "interchange"},
    "evaluation": BELOW_EVALUATION | {"interchange", "workdir"},
    "stages": BELOW_EVALUATION
    | {"reinforcement"}
    | {*("interchange", "evaluation", "workdir", "arguments", "commands", "children")},
}

# The modules beside the rooms. Only the command line knows the stages.
MODULES = {
    "errors": set(),
    "schema": {"errors"},
    "arguments": {"errors", "schema", "config"},
    "config": {"errors", "schema"},
    "workdir": {"errors", "schema"},
    "commands": set(),
    "children": set(),
    "sweep": {"errors"},
    "cli": {*MAY_IMPORT, *COMMONS, "arguments", "commands"},
    "__init__": BELOW_EVALUATION | {"interchange", "evaluation"} | COMMONS,
    "__main__": {"cli"},
}


def imports(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Yields the first name below `instar` of each import in `source`, lazy ones included.

    Args:
      package: the names of the package that the module is in, such as ("instar", "data").
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            modules = [f"{module}.{alias.name}" for alias in node.names]
        else:
            modules = module_names(node)
        for module in modules:
            first, *rest = module.split(".")
            if first == "instar" and rest:
                yield rest[0]


def module_names(node: ast.AST) -> list[str]:
    """The module that a call such as importlib.import_module("instar.data") names."""
    if not isinstance(node, ast.Call) or not node.args:
        return []
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    first = node.args[0]
    if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
        return [str(first.value)]
    return []


def violations(room: str, source: str) -> list[str]:
    """The imports in a module of `room` (or in the top module `room`) that break the rules."""
    if room in MODULES:
        allowed, package = MODULES[room], ("instar",)
    else:
        allowed, package = MAY_IMPORT[room] | COMMONS | {room}, ("instar", room)
    names = {"__version__"}  # names of the package itself, which are no rooms
    return sorted(set(imports(source, package)) - allowed - names)


def modules() -> list[pathlib.Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def test_every_room_is_listed():
    found = {path.parts[0].removesuffix(".py") for path in modules()}
    assert found == {*MAY_IMPORT, *MODULES}


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_stay_in_their_direction(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert violations(path.parts[0].removesuffix(".py"), source) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("models", "from instar.data import dataset", ["data"]),
        ("models", "from instar.workdir import read_json", ["workdir"]),
        ("workdir", "from instar.data import dataset", ["data"]),
        ("models", "import instar.sharding.rules", ["sharding"]),
        ("objectives", "from instar import models", ["models"]),
        ("data", "def lazily():\n    from instar.models.spec import ModelSpec", ["models"]),
        ("data", "from ..training import loop", ["training"]),
        ("data", "from .. import stages", ["stages"]),
        ("training", "import importlib\nimportlib.import_module('instar.stages')", ["stages"]),
        ("evaluation", "if True:\n    import instar.stages.pretrain as p", ["stages"]),
        ("stages", "from instar.cli import main", ["cli"]),
        ("config", "from instar.data.prepare import prepare", ["data"]),
        ("__init__", "from instar.stages.pretrain import pretrain", ["stages"]),
        ("training", "from instar.errors import UserError\nimport jax", []),
        ("data", "from . import loader\nfrom .loader import batches", []),
    ],
)
def test_a_forbidden_import_would_be_found(room, source, found):
    assert violations(room, source) == found
