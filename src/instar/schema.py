"""Frozen dataclasses as schemas: nested plain values become typed, checked configs.

Field types: ``int``, ``float`` (finite; an int is accepted and converted), ``bool``, ``str``,
``Literal[...]``, unions such as ``X | None``, ``tuple[X, ...]`` and ``tuple[X, Y]`` (a list is
accepted), ``dict[str, X]``, other frozen dataclasses, and ``Any``: any of these but a dataclass,
nested at will, which another schema is the judge of.

A dataclass may define ``check(self) -> None``, called after construction, innermost first, which
raises `UserError` for values that are each of the right type but impossible, alone or together.

It may define ``complete(cls, values)`` as a class method, which returns the values that are set
with others added, where one field says something of others. Those that are set keep the last word.

A field that is left out takes its default. Inside a nested dataclass that has a default *instance*
the fields left out come from that instance, so that changing one key changes only that key.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from instar.errors import UserError

T = TypeVar("T")

ABSENT = dataclasses.MISSING
_SCALARS = (int, float, bool, str)


def build(values: Mapping[str, Any], schema: type[T]) -> T:
    """Returns `values` (nested mappings, JSON-like) as a checked `schema`.

    Raises:
      UserError: a key is unknown or missing, or a value has the wrong type or is impossible.
    """
    return _convert_dataclass(values, schema, path="", base=None)


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a dataclass as JSON-ready nested dicts and lists, every default filled in.

    ``build(to_dict(config), type(config)) == config``.
    """
    return {name: jsonable(getattr(config, name)) for name in fields(type(config))}


def fields(schema: type, base: Any = None) -> dict[str, tuple[Any, Any]]:
    """Returns {name: (type, default)}; defaults come from the instance `base` where it is one."""

    def default(field: dataclasses.Field) -> Any:
        if isinstance(base, schema):
            return getattr(base, field.name)
        if field.default_factory is not ABSENT:
            return field.default_factory()
        return field.default

    hints = _hints(schema)
    return {
        field.name: (hints[field.name], default(field))
        for field in dataclasses.fields(schema)
        if field.init
    }


# ---------------------------------------------------------------------------------------------
# Typed values
# ---------------------------------------------------------------------------------------------


def convert(value: Any, kind: Any, path: str, base: Any) -> Any:
    """Returns `value` as type `kind`; `base` is the default that it stands in for."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(value, kind, path, base)
    if origin in (Union, types.UnionType):
        return _convert_union(value, kind, path, base)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind)):
            return value
        raise _mismatch(value, kind, path)
    if origin is tuple:
        return _convert_tuple(value, kind, path)
    if origin is dict:
        return _convert_dict(value, kind, path)
    if kind is Any:
        return _convert_anything(value, path)
    if kind not in _SCALARS:
        raise TypeError(f"{path}: a schema cannot have a field of type {kind}")
    return _convert_scalar(value, kind, path)


def _convert_anything(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        return _convert_dict(value, dict[str, Any], path)
    if isinstance(value, list | tuple):
        return _convert_tuple(value, tuple[Any, ...], path)
    if value is None or isinstance(value, _SCALARS):
        return value
    raise _mismatch(value, Any, path)


def _convert_scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) <= sys.float_info.max else math.nan
        if not math.isfinite(number):
            raise UserError(f"{path}: expected a finite number, got {reprlib.repr(value)}")
        return number
    # bool is a subclass of int, and True is no number of steps.
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise _mismatch(value, kind, path)


def _convert_union(value: Any, kind: Any, path: str, base: Any) -> Any:
    arms = typing.get_args(kind)
    if value is None and types.NoneType in arms:
        return None
    arms = tuple(arm for arm in arms if arm is not types.NoneType)
    containers = [arm for arm in arms if container_of(arm) is not None]
    holds_fields = isinstance(value, Mapping | list | tuple) or dataclasses.is_dataclass(value)
    if len(containers) == 1 and holds_fields:
        return convert(value, containers[0], path, base)  # its messages name the inner field
    for arm in arms:
        try:
            return convert(value, arm, path, base)
        except UserError:
            continue
    raise _mismatch(value, kind, path)


def _convert_tuple(value: Any, kind: Any, path: str) -> tuple:
    arguments = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise _mismatch(value, kind, path)
    if is_variadic(kind):
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise _mismatch(value, kind, path)
    return tuple(
        convert(item, argument, join(path, index), base=None)
        for index, (item, argument) in enumerate(zip(value, arguments, strict=True))
    )


def _convert_dict(value: Any, kind: Any, path: str) -> dict:
    if not isinstance(value, Mapping):
        raise _mismatch(value, kind, path)
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{path}: expected names as keys, got {value_text(key)}")
    item = typing.get_args(kind)[1]
    return {key: convert(each, item, join(path, key), base=None) for key, each in value.items()}


def _convert_dataclass(value: Any, schema: type, path: str, base: Any) -> Any:
    if isinstance(value, schema):
        value, base = {}, value
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: expected the fields of {schema.__name__}, {_got(value)}")
    if callable(getattr(schema, "complete", None)):
        value = schema.complete(value)
    known = fields(schema, base)
    result = {}
    for key, item in value.items():
        if key not in known:
            raise unknown_key(key, known, path)
        kind, default = known[key]
        result[key] = convert(item, kind, join(path, key), default)
    # What is missing comes second: a misspelt key says why it is missing.
    for key, (kind, default) in known.items():
        field_path = join(path, key)
        if default is ABSENT and key not in result:
            raise UserError(
                f"{field_path}: this field is required ({type_name(kind)}); set it in the config "
                f"file or with --config.{field_path}=VALUE"
            )
        if key not in result:
            result[key] = convert(default, kind, field_path, default)
    config = schema(**result)
    if callable(getattr(schema, "check", None)):
        with located(path):
            config.check()
    return config


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
    """Gives the fields that a `UserError` calls section.field the whole path of the section.

    A dataclass may be a section of several others (`optimizer`, `critic.optimizer`), and its check
    knows its usual name alone, the last of the path.
    """
    name = path.rpartition(".")[2]
    try:
        yield
    except UserError as error:
        if not name.isidentifier():
            raise
        raise UserError(re.sub(rf"(?<![\w.]){name}\.(?=[a-z])", f"{path}.", str(error))) from None


# ---------------------------------------------------------------------------------------------
# Looking into types
# ---------------------------------------------------------------------------------------------


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def container_of(kind: Any) -> Any:
    """The arm of `kind` that has something below it: a dataclass, a tuple or a dict; or None.

    Below `Any` are names, as far as one can say.
    """
    if kind is Any:
        return dict[str, Any]
    is_union = typing.get_origin(kind) in (Union, types.UnionType)
    for arm in typing.get_args(kind) if is_union else (kind,):
        if dataclasses.is_dataclass(arm) or typing.get_origin(arm) in (tuple, dict):
            return arm
    return None


def item_of(container: Any) -> Any:
    """The type of the entries of a ``tuple[X, ...]`` or ``dict[str, X]``; None for other tuples."""
    arguments = typing.get_args(container)
    if typing.get_origin(container) is dict:
        return arguments[1]
    return arguments[0] if is_variadic(container) else None


def is_tuple(kind: Any) -> bool:
    """Whether a type is ``tuple[...]``."""
    return typing.get_origin(kind) is tuple


def is_variadic(kind: Any) -> bool:
    """Whether a tuple type is ``tuple[X, ...]``."""
    return typing.get_args(kind)[1:] == (Ellipsis,)


def jsonable(value: Any) -> Any:
    """Returns `value` with dataclasses as dicts and tuples as lists, at every depth."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return value


def default_text(default: Any) -> str:
    """Returns what a field holds where nothing sets it, in words."""
    return "required" if default is ABSENT else repr(jsonable(default))


def type_name(kind: Any) -> str:
    """Returns a field type in words: ``float or None``, ``'adamw' or 'muon'``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is types.NoneType:
        return "None"
    if kind is Any:
        return "any value"
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arm) for arm in arguments)
    if origin is tuple and is_variadic(kind):
        return f"list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_name(item) for item in arguments)}]"
    if origin is dict:
        return f"mapping of names to {type_name(arguments[1])}"
    return kind.__name__


# ---------------------------------------------------------------------------------------------
# Sentences
# ---------------------------------------------------------------------------------------------


def join(path: str, key: Any) -> str:
    """Returns the dotted path of `key` inside `path` (empty at the top)."""
    return f"{path}.{key}" if path else str(key)


def value_text(value: Any) -> str:
    """Returns a value, shortened, and its type, for a sentence."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _got(value: Any) -> str:
    return "got None" if value is None else f"got {value_text(value)}"


def _mismatch(value: Any, kind: Any, path: str) -> UserError:
    return UserError(f"{path}: expected {type_name(kind)}, {_got(value)}")


def unknown_key(key: Any, known: Mapping[str, Any], path: str) -> UserError:
    """Returns the error for a `key` inside `path` that is none of the `known`."""
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        hint = f"did you mean {join(path, close[0])!r}?"
    else:
        place = f"the fields of {path} are" if path else "the fields are"
        hint = f"{place} {', '.join(known)}"
    return UserError(f"{join(path, key)}: there is no such field; {hint}")
