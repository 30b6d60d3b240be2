"""The folder of a run or of a prepared data set: whose it is, and what it says about itself."""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from etils import epath

from instar.errors import UserError
from instar.schema import build, to_dict

# Sections that a restart may change: none of them changes what is computed from which input.
CHANGEABLE = ("mesh", "execution", "checkpoint", "failure", "logging", "loader")


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: it is not there, or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file by way of a rename, so that it is never seen half-written.

    Numbers that are not finite become null.
    """
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(json.dumps(json_ready(value), indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def json_ready(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
    """`value` with what `instead` makes of the numbers that JSON has no name for: NaN, infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return instead(value)
    if isinstance(value, Mapping):
        return {key: json_ready(item, instead) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item, instead) for item in value]
    return value


def claim(workdir: epath.Path, config: Any) -> None:
    """Makes `workdir` the folder of what `config`, a dataclass, describes, or sees that it is.

    Raises:
      UserError: it cannot be written, or belongs to another config (nothing is changed).
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry.name for entry in workdir.iterdir())
        if not path.exists():
            if any(name in entries for name in ("checkpoints", "metrics.jsonl", "manifest.json")):
                raise UserError(
                    f"workdir {workdir} holds something else ({', '.join(entries[:5])}) and no "
                    "config.json: choose a new --workdir"
                )
            write_json(path, to_dict(config))
            return
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (workdir, *workdir.parents) if path.is_file())
        inside = "" if file == workdir else f"lies in {file}, which "
        raise UserError(f"workdir {workdir} {inside}is a file: name a folder") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"workdir {workdir} cannot be written ({reason}): choose another --workdir, or change "
            "its owner or mode"
        ) from None
    previous, described = read_json(path), to_dict(config)
    changed = changes(completed(previous, type(config)), described)
    if changed:
        raise UserError(
            f"workdir {workdir} belongs to another config: {changed}; choose a new --workdir, or "
            "undo the change"
        )
    if previous != described:
        write_json(path, described)


def completed(previous: Mapping[str, Any], schema: type) -> Mapping[str, Any]:
    """What an earlier release wrote of a config, with the defaults of the fields that are new.

    A newer release goes on with a run that does not ask for what is new in it. What the schema
    does not take any more stays as it is.
    """
    try:
        return to_dict(build(previous, schema))
    except UserError:
        return previous


def changes(
    previous: Mapping[str, Any],
    config: Mapping[str, Any],
    changeable: Collection[str] = CHANGEABLE,
) -> str:
    """What changed beside the sections that may, in words; "" where nothing did."""
    changed = [
        f"{key} (was {old!r}, is {new!r})"
        for key, old, new in differences(previous, config)
        if key.split(".")[0] not in changeable
    ]
    return "; ".join(changed[:6]) + (" and more" if len(changed) > 6 else "")


def differences(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two JSON values differ: (dotted key, value in a, value in b)."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix, a, b


def record_start(workdir: epath.Path, step: int, *, facts: Mapping[str, Any]) -> None:
    """Adds a start at `step` to run.json, beside the facts of the machine that it runs on."""
    path = workdir / "run.json"
    starts = read_json(path)["starts"] if path.exists() else []
    write_json(path, {**facts, "starts": [*starts, {"step": step, "time": time.time()}]})
