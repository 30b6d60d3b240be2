"""`instar import` and `instar export`: between other programs' formats and Instar's checkpoints."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from etils import epath

from instar.data.tokenizer_export import save_for_transformers
from instar.errors import UserError
from instar.families.family import HubFormat
from instar.families.hub_config import HubConfig
from instar.families.registry import FAMILIES
from instar.interchange import safetensors
from instar.interchange.card import ModelCard
from instar.interchange.loading import find_checkpoint, model_of, read_card
from instar.interchange.parameters import (
    ForeignParameter,
    flatten,
    tensors_to_write,
    unflatten,
)
from instar.interchange.score_head import BIAS, with_score, written_head
from instar.interchange.sources import CONFIG, GENERATION_CONFIG, open_foreign
from instar.models.spec import ModelSpec
from instar.training.checkpoint_files import (
    CHECKPOINTS,
    Streamed,
    absolute,
    read_parameter,
    write_model,
)
from instar.training.fingerprint import combine, leaf_print

DType = Literal["float32", "bfloat16"]

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class ImportOptions:
    """A model that others made becomes an Instar checkpoint, from which any stage goes on.

    `from` is a folder with a config.json and safetensors, or a .gguf file; `to` a new folder, in
    whose `tokenizer/` is what data for the model is to be prepared with.
    `dtype` is that of the parameters: float32 to train on.
    """

    from_: str
    to: str
    dtype: DType = "float32"


@dataclass(frozen=True)
class ExportOptions:
    """A checkpoint becomes a folder that Hugging Face's transformers loads.

    `checkpoint` is a run's folder (its newest checkpoint) or the folder of one checkpoint; `to` a
    new folder. Of a reward model of several networks `member` says which, from 0 on. A score is
    what transformers gives plus `score_bias` of config.json.
    """

    checkpoint: str
    to: str
    dtype: DType = "float32"
    member: int | None = None


def import_model(options: ImportOptions) -> None:
    """Writes `options.to`, parameter by parameter: one at a time is in memory.

    Raises:
      UserError: the source is a checkpoint already or cannot be read, or the target is not empty;
        nothing is left behind.
    """
    if find_checkpoint(options.from_) is not None:
        raise UserError(f"{options.from_} is a checkpoint already: use it as it is, without import")
    foreign, target = open_foreign(Path(options.from_)), absolute(options.to)
    parameters, dtype = foreign.parameters(model_of(foreign.card)), jnp.dtype(options.dtype)
    prints: list[bytes] = []

    def streamed(path: str, parameter: ForeignParameter) -> Streamed:
        def make() -> np.ndarray:
            whole = tuple(slice(None) for _ in parameter.shape)
            array = parameter.read(whole, dtype)
            prints.append(leaf_print("".join(f"['{key}']" for key in path.split(".")), array))
            return array

        return Streamed(parameter.shape, dtype, make)

    def lineage() -> dict[str, Any]:
        return {
            "stage": "import",
            "parent": None,
            "source": str(foreign.source),
            "tokenizer": foreign.card.tokenizer and foreign.card.tokenizer.digest,
            "tokens": 0,
            "step": 0,
            "dtype": dtype.name,
            "params": combine(prints),
            "instar": metadata.version("instar"),
        }

    params = unflatten((path, streamed(path, each)) for path, each in parameters.items())
    items = {"model": foreign.card.to_json(), "lineage": lineage}
    with _new_folder(target) as folder:
        write_model(folder / CHECKPOINTS / "0", params, items)
        if foreign.card.tokenizer is not None:
            foreign.card.tokenizer.save(folder / TOKENIZER)
    print(f"{foreign.source} -> {target} ({_describe(foreign.card.spec, parameters)})")


def export_model(options: ExportOptions) -> None:
    """Writes `options.to`, tensor by tensor.

    Raises:
      UserError: there is no such checkpoint or member of it, transformers has no model like it, or
        the target is not empty.
    """
    checkpoint, target = find_checkpoint(options.checkpoint), Path(options.to)
    if checkpoint is None:
        raise UserError(f"{options.checkpoint} is no checkpoint: give a run's folder")
    card = read_card(checkpoint)
    model, stem = model_of(card), _stem_of_member(card, options)
    shapes = flatten(model.shapes)

    def read(path: str) -> np.ndarray:
        path = stem + path
        return read_parameter(checkpoint, tuple(path.split(".")), shapes[path])

    architecture = write_hub_folder(card, read, target, jnp.dtype(options.dtype))
    print(f"{checkpoint} -> {target} ({architecture}, {options.dtype})")


def _stem_of_member(card: ModelCard, options: ExportOptions) -> str:
    """What the paths of one network's parameters begin with."""
    members, member = card.members, options.member
    if members is None and member is not None:
        raise UserError(f"{options.checkpoint} is a language model: leave --member out")
    if members is None:
        return ""
    if (member is None and members > 1) or (member is not None and not 0 <= member < members):
        raise UserError(
            f"{options.checkpoint} is a reward model of {members}, and a folder holds one: give "
            f"--member=N, with N from 0 to {members - 1}"
        )
    return f"member_{member or 0}."


def write_hub_folder(
    card: ModelCard, read: Callable[[str], np.ndarray], target: Path, dtype: np.dtype
) -> str:
    """Writes a model as transformers stores it; returns the class that loads it.

    Args:
      read: the parameter of a path, of a language model or of one network that scores; called once
        for each.

    Raises:
      UserError: transformers has no model like it, or the target is not empty.
    """
    form, config = hub_format_of(card.spec)
    scores = card.spec.output == "scalar"
    layout, architecture = form.layout, form.architecture
    if scores:
        layout, architecture = with_score(layout), form.scorer
        config |= written_head(card)
    placed = layout.tensors(card.spec)
    shapes = {each.name: each.tensor.shape(each.sizes) for each in placed if each.name != BIAS}
    head = {"architectures": [architecture], "model_type": form.model_types[0]}
    with _new_folder(absolute(target)) as folder:
        writer = safetensors.FolderWriter(Path(folder), shapes, dtype)
        for name, tensor in tensors_to_write(layout, card.spec, read):
            if name == BIAS:
                config[BIAS] = float(tensor[0])
            else:
                writer.write(name, tensor)
        writer.close()
        _write_configs(Path(folder), card, head, config, dtype.name)
    return architecture


def hub_format_of(spec: ModelSpec) -> tuple[HubFormat, dict[str, Any]]:
    """The format of transformers that says all of a spec, and its config's fields.

    What a family writes must read back as the very same spec: no feature is dropped in silence.
    Of a spec that scores, this holds of all but the head.

    Raises:
      UserError: there is none.
    """
    formats = [family.hub for family in FAMILIES.values() if family.hub is not None]
    if spec.output == "scalar":
        formats = [form for form in formats if form.scorer is not None]
        spec = spec.replace(output="logits")
        names = ", ".join(form.scorer for form in formats)
    else:
        names = ", ".join(form.architecture for form in formats)
    for form in sorted(formats, key=lambda form: form.own_code):
        try:
            fields = form.write_config(spec)
            written = HubConfig(json.loads(json.dumps(fields)), form.architecture)
            found = form.read_config(written)
        except (UserError, KeyError, AttributeError, TypeError):
            continue  # of another kind altogether
        if found == spec:
            return form, fields
    raise UserError(
        f"no model of transformers that can be written is like this one (there are {names}): "
        "its layers combine what none of them combines"
    )


def _write_configs(
    folder: Path, card: ModelCard, head: dict[str, Any], fields: dict[str, Any], dtype: str
) -> None:
    """config.json, generation_config.json, and the tokenizer with its chat template."""
    # Of one that is left out, and not null, transformers assumes what LLaMA's first tokenizer had.
    ids = {"bos_token_id": None, "eos_token_id": list(card.stop_ids) or None, "pad_token_id": None}
    if card.tokenizer is not None:
        if card.begins_with_bos:
            ids["bos_token_id"] = card.tokenizer.bos_id
        ids["eos_token_id"] = ids["eos_token_id"] or card.tokenizer.eos_id
        ids["pad_token_id"] = card.tokenizer.pad_id
        save_for_transformers(card.tokenizer, folder, card.chat_template)
    _write_json(folder / CONFIG, head | ids | fields | {"torch_dtype": dtype})
    _write_json(folder / GENERATION_CONFIG, ids)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill, which becomes `target` when all is in it; what fails leaves nothing."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty: give --to a new folder")
    partial = target.parent / f"{target.name}.partial"
    if partial.exists():  # of a try that was killed
        partial.rmtree()
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{target} cannot be written ({reason}): choose another --to") from None
    finally:
        if partial.exists():
            partial.rmtree()


def _describe(spec: ModelSpec, parameters: dict[str, ForeignParameter]) -> str:
    count = sum(int(np.prod(each.shape)) for each in parameters.values())
    return f"{count:,} parameters, {spec.depth} layers, {spec.max_positions:,} positions"
