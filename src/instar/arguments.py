"""The words behind a command, as options and values."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from instar.errors import UserError

T = TypeVar("T")


def option_pairs(
    words: Sequence[str], switches: Collection[str] = ()
) -> tuple[list[tuple[str, str]], list[str]]:
    """Splits words into (option, value) pairs and the others.

    ``--option=value`` and ``--option value`` are the same, but for those of `switches`: a bare
    ``--switch`` is true, whatever comes behind it. Behind a lone ``--`` there are no options.
    """
    pairs: list[tuple[str, str]] = []
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            others += remaining
        elif not word.startswith("--"):
            others.append(word)
        else:
            option, equals, value = word.partition("=")
            if not equals and spelled(option) in switches:
                value = "true"
            elif not equals:
                value = next(remaining, "--")
                if value.startswith("--"):
                    raise UserError(f"{option} needs a value: {option}=VALUE")
            pairs.append((option, value))
    return pairs, others


def spelled(option: str) -> str:
    """An option as its field is spelled: ``--log-probs`` is ``--log_probs``."""
    return option.replace("-", "_").replace("__", "--", 1)


def not_an_option(word: str) -> UserError:
    """The error for a word where only options may be."""
    return UserError(f"{word!r} is not an option; options begin with -- (--help lists them)")


def no_such_option(option: str, known: Iterable[str]) -> UserError:
    """The error for an option that is none of those known."""
    return UserError(f"there is no option {option!r}; {nearest(option, known, 'the options')}")


def nearest(word: str, choices: Iterable[str], what: str) -> str:
    """What to say of a word that is none of `choices`."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"{what} are {', '.join(choices)}"


def flag(name: str) -> str:
    """The option of a dataclass's field; `from_` stands for --from, a word of Python's."""
    return f"--{name.rstrip('_')}"


def positional_field(schema: type) -> str | None:
    """The field that takes the words which are no options, where the schema has one."""
    return _marked(schema, "positional")


def overrides_field(schema: type) -> str | None:
    """The field that takes what changes a config: ``--config.NAME=VALUE`` as (NAME, VALUE)."""
    return _marked(schema, "overrides")


def _marked(schema: type, mark: str) -> str | None:
    fields = dataclasses.fields(schema)
    return next((field.name for field in fields if field.metadata.get(mark)), None)


def from_words(words: Sequence[str], schema: type[T]) -> T:
    """The options in `words` as a `schema`, a dataclass: a field `top_p` is ``--top_p``.

    An option of a field that is a tuple may be given several times; that of a bool needs no value.

    Raises:
      UserError: there is no such option, its value does not fit, or one that is needed is missing.
    """
    from instar import schema as schemas
    from instar.config import read_text

    known = schemas.fields(schema)
    positional, overrides = positional_field(schema), overrides_field(schema)
    names = {flag(name): name for name in known if name != overrides}
    switches = {flag(name) for name, (kind, _) in known.items() if kind is bool}
    pairs, others = option_pairs(words, switches)
    if others and positional is None:
        raise UserError(
            f"{others[0]!r} is not an option; options begin with -- (--help lists them)"
        )
    values: dict[str, Any] = {positional: others} if others else {}
    for option, text in pairs:
        if overrides is not None and option.startswith("--config."):
            values.setdefault(overrides, []).append((option.removeprefix("--config."), text))
            continue
        option = spelled(option)
        if option not in names:
            raise UserError(
                f"there is no option {option!r}; {nearest(option, names, 'the options')}"
            )
        name = names[option]
        kind = known[name][0]
        item = schemas.item_of(kind) if schemas.is_tuple(kind) else None
        if item is None:
            values[name] = schemas.convert(read_text(text, kind), kind, option, None)
        else:
            values.setdefault(name, []).append(schemas.convert(text, item, option, None))
    for name, (kind, default) in known.items():
        if default is schemas.ABSENT and name not in values:
            raise UserError(f"{flag(name)} is missing ({schemas.type_name(kind)})")
    return schemas.build(values, schema)
