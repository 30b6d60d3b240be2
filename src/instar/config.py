"""From a config file and overrides to a checked, typed, frozen dataclass.

A config file is Python with ``get_config() -> ml_collections.ConfigDict``, which may take one
argument: ``gpt3.py:125m`` calls ``get_config("125m")``. The *schema* of a command is a frozen
dataclass that lives beside what it configures (`instar.schema` says what it may hold). Everything
is checked before anything runs: a wrong key, type or value is one sentence (`UserError`), not a
failure an hour later.
"""

import ast
import contextlib
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import config_dict

from instar import schema as schemas
from instar.errors import UserError
from instar.schema import build, to_dict

__all__ = ["build", "load", "run_file", "split_argument", "to_dict"]

T = TypeVar("T")


def load(path: str, overrides: Sequence[tuple[str, str]], schema: type[T]) -> T:
    """Returns the config of file `path`, changed by `overrides`, as a `schema`.

    Args:
      path: a Python file with ``get_config()``, and behind a colon the argument of that.
      overrides: (dotted key, text) pairs, applied in order. A text is read as a Python literal
        where the field's type takes it (``true`` and ``false`` also), else as a plain string. An
        integer in the key is an index into a tuple: ``("sources.0.path", "reviews.csv")``.
      schema: a dataclass type.

    Raises:
      UserError: the file or an override is not valid, or their values do not fit the schema.
    """
    config = _run_config_file(path)
    for key, text in overrides:
        _override(config, key.split("."), text, schema, default=None, path="")
    return build(_plain(config), schema)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _run_config_file(path: str) -> config_dict.ConfigDict:
    config = run_file(path, "get_config", "config")
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"get_config() in {path} must return an ml_collections.ConfigDict, "
            f"not {schemas.value_text(config)}"
        )
    return config


def split_argument(path: str) -> tuple[str, str | None]:
    """``gpt3.py:125m`` as the file and the argument of its function; None where there is none."""
    stem, mark, argument = path.partition(".py:")
    return (f"{stem}.py", argument) if mark else (path, None)


def run_file(path: str, function: str, what: str) -> Any:
    """Runs a Python file and returns what its `function` returns; of a generator, a list.

    Args:
      path: the file, and behind a colon the argument of a function that takes one.
      what: the file is called in messages: "config" for "config file x.py".

    Raises:
      UserError: it cannot be read, has no such function, takes another argument, or fails.
    """
    path, argument = split_argument(path)
    try:
        source = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} file {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} file {path} cannot be read: {error}") from None
    namespace: dict[str, Any] = {"__name__": f"instar_{what}", "__file__": str(path)}
    try:
        exec(compile(source, str(path), "exec"), namespace)
        if not callable(namespace.get(function)):
            raise UserError(f"{what} file {path} must define {function}()")
        arguments = _arguments(namespace[function], argument, f"{what} file {path}")
        result = namespace[function](*arguments)
        return list(result) if isinstance(result, types.GeneratorType) else result
    except UserError:
        raise
    except Exception as error:
        place = f"{what} file {path}, line {_line(error, str(path))}"
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error


def _arguments(function: Callable, argument: str | None, file: str) -> tuple[Any, ...]:
    """What the function of a file is called with.

    A parameter's annotation says what it may be, such as ``Literal["125m", "350m"]``; without one
    it is any text.

    Raises:
      UserError: `argument` is missing, is one too many, or is none that the function takes.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) > 1:
        raise UserError(f"{file}: {function.__name__}() may take one argument at most")
    if not parameters:
        if argument is None:
            return ()
        raise UserError(f"{file} takes no argument: leave ':{argument}' behind it out")
    (parameter,) = parameters
    kind = typing.get_type_hints(function).get(parameter.name, str)
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    allowed = f"one of {', '.join(map(str, choices))}" if choices else schemas.type_name(kind)
    if argument is None:
        if parameter.default is not parameter.empty:
            return ()
        raise UserError(f"{file} needs its {parameter.name} behind a colon: {allowed}")
    try:
        return (schemas.convert(read_text(argument, kind), kind, parameter.name, base=None),)
    except UserError:
        raise UserError(f"{file}: {parameter.name} must be {allowed}, not {argument!r}") from None


def _line(error: Exception, path: str) -> int | None:
    """The last line of file `path` that `error` passed through."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _plain(value: Any, path: str = "") -> Any:
    """Resolves field references and turns every ConfigDict into a dict."""
    if isinstance(value, config_dict.FieldReference):
        try:
            return _plain(value.get(), path)
        except config_dict.RequiredValueError:
            raise UserError(
                f"{path}: the config file leaves this to you; give it with --config.{path}=VALUE"
            ) from None
    if isinstance(value, config_dict.ConfigDict):
        items = value.items(preserve_field_references=True)
        return {key: _plain(item, schemas.join(path, key)) for key, item in items}
    if isinstance(value, Mapping):
        return {key: _plain(item, schemas.join(path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, schemas.join(path, index)) for index, item in enumerate(value)]
    return value


# ---------------------------------------------------------------------------------------------
# Overrides
#
# They act on the ConfigDict, before its field references are resolved, so that values which the
# file computes from an overridden one follow it. The schema is walked alongside: it tells how to
# read the text, and it supplies the entries of a tuple that the file leaves at its default.
# ---------------------------------------------------------------------------------------------


def _override(node: Any, keys: list[str], text: str, kind: Any, default: Any, path: str) -> None:
    """Sets the value below `node` (a ConfigDict, dict or list of type `kind`) to `text`."""
    key, rest = keys[0], keys[1:]
    child_path = schemas.join(path, key)
    child_kind, child_default = _descend(kind, default, key, path)
    if isinstance(node, list):
        key = _index(key, node, child_path)
    if not rest:
        _set(node, key, read_text(text, child_kind))
        return
    if schemas.container_of(child_kind) is None:
        nature = f"{child_path} is {schemas.type_name(child_kind)}"
        raise UserError(f"{schemas.join(child_path, rest[0])}: {nature} and has nothing below it")
    child = _get(node, key)
    if child is None:
        child = _stand_in(child_kind, child_default)
    if isinstance(child, config_dict.ConfigDict):
        _override(child, rest, text, child_kind, child_default, child_path)
        return
    child = schemas.jsonable(child)
    if isinstance(child, list | dict):
        _override(child, rest, text, child_kind, child_default, child_path)
        _set(node, key, child)
    elif child_kind is Any:
        raise UserError(f"{child_path} is {schemas.value_text(child)} and has nothing below it")
    # Anything else is a value of the wrong type in the file, which `build` will report.


def _stand_in(kind: Any, default: Any) -> Any:
    """What an override changes where the file sets nothing."""
    container = schemas.container_of(kind)
    if dataclasses.is_dataclass(container):
        return {}  # `build` takes the other fields from the default
    if isinstance(default, dict | tuple):
        return schemas.jsonable(default)
    return [] if typing.get_origin(container) is tuple else {}


def _descend(kind: Any, default: Any, key: str, path: str) -> tuple[Any, Any]:
    """Returns the type and the default of what `key` names inside the container `kind`."""
    container = schemas.container_of(kind)
    if dataclasses.is_dataclass(container):
        known = schemas.fields(container, default)
        if key not in known:
            raise schemas.unknown_key(key, known, path)
        return known[key]
    if typing.get_origin(container) is dict:
        inherited = default.get(key) if isinstance(default, dict) else None
        return typing.get_args(container)[1], inherited
    arguments = typing.get_args(container)
    if not key.isdecimal():
        raise UserError(
            f"{schemas.join(path, key)}: expected an index, such as {schemas.join(path, 0)}"
        )
    index = int(key)
    inherited = default[index] if isinstance(default, tuple) and index < len(default) else None
    if schemas.is_variadic(container):
        return arguments[0], inherited
    if index >= len(arguments):
        raise UserError(f"{schemas.join(path, key)}: {path} has {len(arguments)} entries")
    return arguments[index], inherited


def _index(key: str, values: list, path: str) -> int:
    if not key.isdecimal():
        raise UserError(f"{path}: expected an index; this is a list of {len(values)}")
    if int(key) >= len(values):
        raise UserError(f"{path}: there is no such entry; the list has {len(values)}")
    return int(key)


def _get(node: Any, key: Any) -> Any:
    """Returns what stands at `key`, None where nothing does."""
    if isinstance(node, list):
        return node[key]
    try:
        return node.get(key)
    except config_dict.RequiredValueError:
        return None


def _set(node: Any, key: Any, value: Any) -> None:
    """Assigns without ConfigDict's own type check: the schema is the judge."""
    if not isinstance(node, config_dict.ConfigDict):
        node[key] = value
        return
    if node.is_locked:
        node.unlock()
    present = dict(node.items(preserve_field_references=True))
    if isinstance(present.get(key), config_dict.FieldReference):
        present[key].set(value, type_safe=False)
        return
    if key in present:
        del node[key]
    node[key] = value


def read_text(text: str, kind: Any) -> Any:
    """Returns the first reading of `text` that has type `kind`."""
    readings: list[Any] = [text]
    if text in ("true", "false"):
        readings.insert(0, text == "true")
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        readings.insert(0, ast.literal_eval(text))
    for reading in readings:
        try:
            schemas.convert(reading, kind, path="", base=None)
        except UserError:
            continue
        return reading
    return readings[0]
