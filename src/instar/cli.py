"""The command line: ``instar COMMAND --config FILE --workdir DIR [--config.a.b=value ...]``.

What trains takes a config file (``FILE:ARGUMENT`` where that takes an argument) and a workdir; what
uses a model takes options (``--model=PATH``). What a command leads to is imported only when it
runs, so that ``--help`` and a mistyped command answer at once.
"""

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from instar import __version__
from instar.arguments import (
    flag,
    from_words,
    nearest,
    no_such_option,
    not_an_option,
    option_pairs,
    overrides_field,
    positional_field,
)
from instar.commands import COMMANDS, Command, resolve
from instar.errors import RestartError, RunError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or that of the error (`instar.errors`).

    Where several processes run the command, one that fails ends all of them with its code.

    Args:
      arguments: the words after ``instar``; None takes those of this process.
    """
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except (UserError, RunError, RestartError) as error:
        return _failed(error.code, f"error: {error}")
    except KeyboardInterrupt:
        return _failed(130, "interrupted")
    return 0


def _failed(code: int, why: str) -> int:
    """Says why and returns `code`; where the command joined other processes, all end with it."""
    processes = sys.modules.get("instar.sharding.processes")
    if processes is not None:
        processes.wait_for_news()
    print(f"instar: {why}", file=sys.stderr)
    if processes is not None:
        processes.end_processes(code, why)
    return code


def _run(words: list[str]) -> None:
    if not words:
        raise UserError(f"a command is needed: {', '.join(COMMANDS)} (instar --help says more)")
    if words[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if words[0] == "--version":
        print(f"instar {__version__}")
        return
    name = words[0]
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; {nearest(name, COMMANDS, 'the commands')}")
    command = COMMANDS[name]
    if "-h" in words or "--help" in words:
        print(_command_help(name, command))
        return
    function_arguments = _read_arguments(words[1:], command)
    resolve(command.function)(*function_arguments)


def _read_arguments(words: list[str], command: Command) -> tuple:
    """What the command's function is called with."""
    if command.options is not None:
        return (from_words(words, resolve(command.options)),)
    from instar.config import load

    options = _parse(words)
    config = load(options.config, options.overrides, resolve(command.config))
    if getattr(config, "hardware", None) is not None:
        from instar.stages.presets import start_hardware

        start_hardware(config.hardware)
    return config, options.workdir


# --- Arguments ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    workdir: str
    config: str
    overrides: list[tuple[str, str]]


def _parse(words: list[str]) -> _Options:
    known = ["--config", "--workdir"]
    given: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    pairs, others = option_pairs(words)
    if others:
        raise not_an_option(others[0])
    for option, value in pairs:
        if option in known:
            given[option] = value
        elif option.startswith("--config."):
            overrides.append((option.removeprefix("--config."), value))
        else:
            raise no_such_option(option, known)
    for option in known:
        if not given.get(option):
            extra = ", which --config.NAME=VALUE changes" if overrides else ""
            meaning = "a config file" + extra if option == "--config" else "a folder"
            raise UserError(f"{option} is missing ({meaning})")
    return _Options(given["--workdir"], given["--config"], overrides)


# --- Help ---------------------------------------------------------------------------------------


_CONFIG_WORDS = "--config FILE[:ARGUMENT] --workdir DIR [--config.FIELD=VALUE ...]"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: instar COMMAND {_CONFIG_WORDS}",
            "       instar COMMAND --OPTION=VALUE ...",
            "       instar COMMAND --help",
            "       instar --version",
            "",
            *lines,
        ]
    )


def _command_help(name: str, command: Command) -> str:
    if command.options is not None:
        return _options_help(name, command.summary, resolve(command.options))
    schema = resolve(command.config)
    return "\n".join(
        [
            f"usage: instar {name} {_CONFIG_WORDS}",
            "",
            f"{name} {command.summary}.",
            "",
            "The config's fields, their types and what holds where a config leaves them out:",
            *_fields_help(schema, prefix="", base=None),
        ]
    )


def _options_help(name: str, summary: str, schema: type) -> str:
    from instar import schema as schemas

    fields = schemas.fields(schema, None)
    positional, overrides = positional_field(schema), overrides_field(schema)
    rows = [
        (flag(field), schemas.type_name(kind), schemas.default_text(default))
        for field, (kind, default) in fields.items()
        if field not in (positional, overrides)
    ]
    extra = f" [{positional.upper()} ...]" if positional else ""
    extra += " [--config.FIELD=VALUE ...]" if overrides else ""
    return "\n".join(
        [
            f"usage: instar {name} --OPTION=VALUE ...{extra}",
            "",
            f"{name} {summary}.",
            "",
            *(inspect.getdoc(schema) or "").splitlines(),
            "",
            *_table(rows),
        ]
    )


def _fields_help(schema: type, prefix: str, base: Any) -> Iterator[str]:
    """Yields a section for `schema`, then one for each dataclass below it."""
    from instar import schema as schemas

    rows, below = [], []
    for name, (kind, default) in schemas.fields(schema, base).items():
        path = schemas.join(prefix, name)
        nested, index = schemas.container_of(kind), ""
        if nested is not None and not dataclasses.is_dataclass(nested):
            index = ".0" if schemas.is_tuple(nested) else ".NAME"
            nested = schemas.item_of(nested)
        if dataclasses.is_dataclass(nested):
            below.append((nested, path + index, default))
        if not dataclasses.is_dataclass(default):
            rows.append((path, schemas.type_name(kind), schemas.default_text(default)))
    yield ""
    yield from (f"  {line}".rstrip() for line in (inspect.getdoc(schema) or "").splitlines())
    yield ""
    yield from _table(rows)
    for nested, path, default in below:
        yield from _fields_help(nested, path, default)


def _table(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for path, kind, text in rows:
        yield f"    {path:{widths[0]}}  {kind:{widths[1]}}  {text}"
