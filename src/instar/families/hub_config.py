"""Reading the config.json of a model by field and type, so that no mistake goes by in silence."""

import reprlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

from instar.errors import UserError

_MISSING = object()


MOST_LAYERS = 10_000


class HubConfig:
    """The fields of a config.json (or of a part of it).

    Each getter raises UserError, which names the file and the field, where the field is missing
    and has no default, or has another type or an impossible value. A field that is null counts as
    missing.
    """

    def __init__(self, fields: Mapping[str, Any], source: str, prefix: str = ""):
        self._fields, self._source, self._prefix = fields, source, prefix

    def error(self, name: str, problem: str) -> UserError:
        """The error that says what is wrong with a field."""
        return UserError(f"{self._source}: {self._prefix}{name} {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._fields.get(name) is not None

    def integer(
        self, name: str, default: Any = _MISSING, most: int = 2**31 - 1, least: int = 1
    ) -> int:
        """A whole number from `least` to `most`."""
        value = self._get(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, f"must be a whole number of at least {least}, not {value!r}")
        if value > most:
            raise self.error(name, f"must be at most {most:,}, not {reprlib.repr(value)}")
        return value

    def number(self, name: str, default: Any = _MISSING, zero: bool = False) -> float:
        """A finite number above 0, or also 0."""
        value = self._get(name, default)
        if value is default:
            return value
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not sound or not (0 < value <= sys.float_info.max or (zero and value == 0)):
            wanted = "of at least 0" if zero else "above 0"
            raise self.error(name, f"must be a finite number {wanted}, not {reprlib.repr(value)}")
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def choice(self, name: str, choices: Mapping[str, Any], default: Any = _MISSING) -> Any:
        """What `choices` holds for a name."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}, not {value!r}")
        return choices[value]

    def raw(self, name: str) -> Any:
        """The field as it is."""
        return self._get(name, _MISSING)

    def names(self, name: str, choices: Collection[str]) -> list[str]:
        """A list of some of these names."""
        value = self._get(name, _MISSING)
        if not isinstance(value, list) or any(
            not isinstance(each, str) or each not in choices for each in value
        ):
            raise self.error(
                name, f"must be a list of {' or '.join(choices)}, not {reprlib.repr(value)}"
            )
        return value

    def section(self, name: str) -> "HubConfig":
        """The fields below a field."""
        value = self._get(name, _MISSING)
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be a mapping, not {value!r}")
        return HubConfig(value, self._source, f"{self._prefix}{name}.")

    def expect(self, **values: Any) -> None:
        """Refuses a field that says what this code does not do; where it is missing, all is well.

        Raises:
          UserError: a field is neither missing nor the value given here.
        """
        for name, value in values.items():
            found = self._fields.get(name)
            if found is not None and (found != value or type(found) is not type(value)):
                raise self.error(name, f"is {found!r}, and only {value!r} is supported")

    def _get(self, name: str, default: Any) -> Any:
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(name, "is missing")
        return default
