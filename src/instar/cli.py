"""The command line: ``instar COMMAND --config FILE --workdir DIR [--config.a.b=value ...]``.

A command is one line of `COMMANDS`; its room is imported only when it runs, so that ``--help`` and
a mistyped command answer at once.
"""

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from instar import __version__
from instar.errors import RunError, UserError


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command's function and the schema of its config are, as ``module:name``.

    With a schema the function is called with (config, workdir), without one with (workdir).
    """

    summary: str
    function: str
    schema: str | None = None


COMMANDS = {
    "prepare": Command(
        "turns text into a data set of token shards",
        function="instar.data.prepare:prepare",
        schema="instar.data.prepare:PrepareConfig",
    ),
    "pretrain": Command(
        "trains a language model on a prepared data set, or goes on with a run that was stopped",
        function="instar.stages.pretrain:pretrain",
        schema="instar.stages.pretrain:PretrainConfig",
    ),
    "report": Command(
        "writes the report of a run (DIR/report.html) again",
        function="instar.evaluation.report:write_report",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 1 (`RunError`) or 2 (`UserError`).

    Args:
      arguments: the words after ``instar``; None takes those of this process.
    """
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except (UserError, RunError) as error:
        print(f"instar: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("instar: interrupted", file=sys.stderr)
        return 130
    return 0


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
        raise UserError(f"there is no command {name!r}; {_nearest(name, COMMANDS, 'the commands')}")
    command = COMMANDS[name]
    if "-h" in words or "--help" in words:
        print(_command_help(name, command))
        return
    options = _parse(words[1:], command)
    function_arguments: list[Any] = [options.workdir]
    if command.schema is not None:
        from instar.config import load

        schema = resolve(command.schema)
        function_arguments.insert(0, load(options.config, options.overrides, schema))
    resolve(command.function)(*function_arguments)


def resolve(reference: str) -> Any:
    """Imports what ``module:name`` names."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


# --- Arguments ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    workdir: str
    config: str
    overrides: list[tuple[str, str]]


def _parse(words: list[str], command: Command) -> _Options:
    known = ["--workdir"] if command.schema is None else ["--config", "--workdir"]
    given: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    for option, value in _pairs(words):
        if option in known:
            given[option] = value
        elif option.startswith("--config.") and command.schema is not None:
            overrides.append((option.removeprefix("--config."), value))
        else:
            hint = _nearest(option, known, "the options")
            raise UserError(f"there is no option {option!r}; {hint}")
    for option in known:
        if not given.get(option):
            extra = ", which --config.NAME=VALUE changes" if overrides else ""
            meaning = "a config file" + extra if option == "--config" else "a folder"
            raise UserError(f"{option} is missing ({meaning})")
    return _Options(given["--workdir"], given.get("--config", ""), overrides)


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (option, value) from ``--option=value`` and ``--option value``."""
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("--"):
            raise UserError(f"{word!r} is not an option; options begin with -- (--help lists them)")
        option, equals, value = word.partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"{option} needs a value: {option}=VALUE")
        yield option, value


def _nearest(word: str, choices: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{what} are {', '.join(choices)}"


# --- Help ---------------------------------------------------------------------------------------


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: instar COMMAND --config FILE --workdir DIR [--config.FIELD=VALUE ...]",
            "       instar COMMAND --help",
            "       instar --version",
            "",
            *lines,
        ]
    )


def _command_help(name: str, command: Command) -> str:
    usage = f"usage: instar {name} --workdir DIR"
    if command.schema is None:
        return f"{usage}\n\n{name} {command.summary}."
    schema = resolve(command.schema)
    return "\n".join(
        [
            f"usage: instar {name} --config FILE --workdir DIR [--config.FIELD=VALUE ...]",
            "",
            f"{name} {command.summary}.",
            "",
            "The config's fields, their types and what holds where a config leaves them out:",
            *_fields_help(schema, prefix="", base=None),
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
            nested, index = schemas.item_of(nested), ".0"
        if dataclasses.is_dataclass(nested):
            below.append((nested, path + index, default))
        if not dataclasses.is_dataclass(default):
            text = "required" if default is schemas.ABSENT else repr(schemas.jsonable(default))
            rows.append((path, schemas.type_name(kind), text))
    yield ""
    yield from (f"  {line}".rstrip() for line in (inspect.getdoc(schema) or "").splitlines())
    yield ""
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for path, kind, text in rows:
        yield f"    {path:{widths[0]}}  {kind:{widths[1]}}  {text}"
    for nested, path, default in below:
        yield from _fields_help(nested, path, default)
