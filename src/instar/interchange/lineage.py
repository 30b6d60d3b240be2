"""`instar lineage`: the family tree of a model, from what its checkpoint says of its ancestors.

`lineage.json` of a checkpoint holds those of all its ancestors, each under what it was to its child
("parent", and whatever other roles a stage knows). What lies in the ancestors' own folders (config,
model, metrics) is added where these are still there.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from instar.data.dataset import TokenDataset
from instar.errors import UserError
from instar.interchange.loading import find_checkpoint, open_model
from instar.interchange.parents import identity
from instar.models.spec import ModelSpec
from instar.schema import build
from instar.training.checkpoint_files import CHECKPOINTS, read_item
from instar.training.flops import parameter_count
from instar.training.metrics import read_metrics
from instar.workdir import CHANGEABLE

# How many digits of a digest tell one from another.
DIGITS = 12
# Of the sections that the stages share, what is shown; of a stage's own, everything.
MAIN = (
    *("steps", "data.sequence_length", "batch.size", "optimizer.name"),
    *("optimizer.learning_rate", "schedule.kind"),
)
SHARED = {
    *(*CHANGEABLE, "data", "batch", "optimizer", "schedule", "evaluation", "model"),
    *("initialization", "parent"),
}


@dataclass(frozen=True)
class LineageOptions:
    """Prints where a model comes from: each ancestor, its data, its config and what it came to.

    MODEL is a run's folder (its newest checkpoint), the folder of one checkpoint, a Hugging Face
    folder or a GGUF file. `json` prints one JSON object instead of text.
    """

    model: tuple[str, ...] = field(default=(), metadata={"positional": True})
    json: bool = False

    def check(self) -> None:
        if len(self.model) != 1:
            raise UserError(
                f"lineage needs the path of one model, not {len(self.model)}: instar lineage RUN"
            )


def lineage(options: LineageOptions) -> None:
    """Prints the family tree of `options.model`.

    Raises:
      UserError: there is no model.
    """
    root = describe(open_model(options.model[0]).lineage)
    print(json.dumps(root.to_json(), indent=2) if options.json else "\n".join(root.lines()))


@dataclass(frozen=True)
class Ancestor:
    """One model of the tree.

    Attributes:
      facts: what its lineage says of itself: stage, step, tokens, path, digests.
      gone: why nothing of its own folder is known; None where it is there.
      model: shape and size; {} where unknown.
      data: the sources of the prepared data, by name; {} where unknown.
      config: the resolved config of its run; {} where unknown.
      evaluations: the last value up to its step of each metric under eval/, and that step.
      ancestors: by what they are to it.
    """

    facts: dict[str, Any]
    gone: str | None
    model: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    evaluations: dict[str, tuple[float, int]]
    ancestors: dict[str, "Ancestor"]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; a metric that is not finite is a string."""
        measured = {
            name: {"value": value if math.isfinite(value) else str(value), "step": step}
            for name, (value, step) in self.evaluations.items()
        }
        return self.facts | {
            "gone": self.gone,
            "model": self.model,
            "sources": self.data,
            "config": self.config,
            "evaluations": measured,
            "ancestors": {role: each.to_json() for role, each in self.ancestors.items()},
        }

    def lines(self, role: str = "", first: str = "", rest: str = "") -> Iterator[str]:
        """The tree as text; `first` and `rest` are what stands before its lines."""
        facts = self.facts
        step = f", step {facts['step']:,}" if "step" in facts else ""
        tokens = f", {facts['tokens']:,} tokens" if facts.get("tokens") else ""
        label = f"{role}: " if role else ""
        yield f"{first}{label}{facts['stage']}{step}{tokens}"
        below = "│ " if self.ancestors else "  "
        rows = {name: text for name, text in self._rows() if text}
        width = max(map(len, rows))
        for name, text in rows.items():
            yield f"{rest}{below} {name:{width}}  {text}"
        last = len(self.ancestors) - 1
        for index, (name, ancestor) in enumerate(self.ancestors.items()):
            yield f"{rest}│"
            corner, line = ("└─ ", "   ") if index == last else ("├─ ", "│  ")
            yield from ancestor.lines(name, rest + corner, rest + line)

    def _rows(self) -> Iterator[tuple[str, str]]:
        facts = self.facts
        yield "path", facts["path"]
        yield "source", facts.get("source", "")
        yield "gone", self.gone or ""
        known = identity(facts)
        kind = "parameters" if facts.get("params") else "files"
        yield kind, _short(known) or "of no known fingerprint"
        yield "model", _joined(self.model)
        yield "tokenizer", _short(facts.get("tokenizer"))
        yield "data", _short(facts.get("data"))
        for name, source in self.data.items():
            yield f"  {name}", _joined(source)
        yield "config", "; ".join(f"{key} {value}" for key, value in main_values(self.config))
        measured = (
            f"{name.removeprefix('eval/')} {value:.5g} (step {step:,})"
            for name, (value, step) in self.evaluations.items()
        )
        yield "evaluations", "; ".join(measured)


def _joined(numbers: Mapping[str, int]) -> str:
    return "; ".join(f"{name} {number:,}" for name, number in numbers.items())


def _short(digest: Any) -> str:
    """A digest, or several by name, so that a line has room for it."""
    if isinstance(digest, Mapping):
        return "; ".join(f"{name} {_short(each)}" for name, each in digest.items())
    return str(digest or "")[:DIGITS]


def describe(facts: Mapping[str, Any]) -> Ancestor:
    """The tree of the model whose lineage is `facts`, which says where it lies under "path"."""
    ancestors = {
        role: describe(each)
        for role, each in facts.items()
        if isinstance(each, Mapping) and "stage" in each
    }
    own = {name: value for name, value in facts.items() if name not in {*ancestors, "parent"}}
    gone = _missing(own)
    config, model, evaluations = {}, {}, {}
    if gone is None:
        checkpoint = find_checkpoint(own["path"])
        model = _model_of(own["path"], checkpoint)
        if checkpoint is not None:
            config = _config_of(checkpoint)
            evaluations = _evaluations(checkpoint, own.get("step", 0))
    return Ancestor(own, gone, model, _sources(config, own), config, evaluations, ancestors)


def _missing(facts: Mapping[str, Any]) -> str | None:
    """Why the folder of a model tells nothing: it is gone, or holds another model now."""
    try:
        found = open_model(facts["path"]).lineage
    except UserError as error:
        return f"nothing of it can be read any more ({error}); the lineage of its child tells this"
    if identity(found) != identity(facts):
        return (
            f"another model lies there now ({_short(identity(found))}); the lineage of its "
            "child tells this"
        )
    return None


def _model_of(path: str, checkpoint: epath.Path | None) -> dict[str, Any]:
    """Shape and size of a model, by name."""
    if checkpoint is None:
        card = open_model(path).card
        spec, members = card.spec, card.members
    else:
        card = read_item(checkpoint, "model")
        spec, members = build(card["spec"], ModelSpec), card.get("members")
    shape = {
        "parameters": parameter_count(spec).total * (members or 1),
        "layers": spec.depth,
        "width": spec.width,
        "vocabulary": spec.vocab_size,
        "positions": spec.max_positions,
    }
    return shape | ({"members": members} if members else {})


def _config_of(checkpoint: epath.Path) -> dict[str, Any]:
    """The config of the run; {} for a model that was imported."""
    try:
        return read_item(checkpoint, "config")
    except UserError:
        return {}


def _evaluations(checkpoint: epath.Path, step: int) -> dict[str, tuple[float, int]]:
    """The last value of each metric under eval/ that the run had written when it saved."""
    if checkpoint.parent.name != CHECKPOINTS:
        return {}
    found = {}
    for line in read_metrics(checkpoint.parent.parent):
        if line.get("step", 0) <= step:
            names = (name for name in line if name.startswith("eval/"))
            found |= {name: (line[name], int(line["step"])) for name in names}
    return found


def _sources(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Documents and tokens of each source, where the data set is still the same."""
    data = config.get("data")
    path = data.get("path") if isinstance(data, Mapping) else None
    try:
        dataset = TokenDataset.open(path or "")
    except UserError:
        return {}
    if dataset.digest != facts.get("data"):
        return {}
    return {
        name: {key: source.facts[key] for key in ("documents", "tokens")}
        for name, source in dataset.sources.items()
    }


def main_values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What of a resolved config tells a run from others: `MAIN`, and what only its stage has."""
    leaves = dict(_leaves(config))
    for name in MAIN:
        if name in leaves:
            yield name, leaves[name]
    for name, value in leaves.items():
        # What is off, or not set, says nothing.
        if name not in MAIN and name.split(".")[0] not in SHARED and value:
            yield name, value


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value
