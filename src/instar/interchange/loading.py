"""`instar.load`: a model by path, whoever made it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from instar.errors import UserError
from instar.interchange.card import ModelCard
from instar.interchange.model import Model
from instar.interchange.parameters import flatten, load_params
from instar.interchange.reward import LoadedRewardModel
from instar.interchange.sources import digest_of_files, open_foreign
from instar.models.language_model import LanguageModel, Params
from instar.models.reward_model import RewardModel
from instar.models.transformer import Execution
from instar.sharding import rules
from instar.sharding.execution import on_mesh
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.checkpoint_files import CHECKPOINTS, absolute, newest, read_arrays, read_item
from instar.training.fingerprint import fingerprint


def load(
    path: epath.PathLike, *, dtype: str = "float32", mesh: Mesh | None = None
) -> Model | LoadedRewardModel:
    """Loads a model from an Instar checkpoint, a Hugging Face folder or a GGUF file.

    A checkpoint of the stage `reward`, or a folder of a classifier with one label, gives a
    `LoadedRewardModel`, everything else a `Model`.

    Args:
      path: a run's workdir (its newest checkpoint), the folder of one checkpoint, a folder with a
        config.json and safetensors, or a .gguf file.
      dtype: that of the parameters and of the computation: "float32" or "bfloat16".
      mesh: the devices, and how the parameters are laid out on them; one device where None.

    Raises:
      UserError: nothing that can be read is there; one sentence says what is wrong with it.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    opened, dtype = open_model(path), jnp.dtype(dtype)
    model = _on_mesh(opened.card, dtype, mesh)
    params = opened.read(model, dtype, mesh)
    if isinstance(model, RewardModel):
        return LoadedRewardModel(opened.card, model, params, mesh)
    return Model(opened.card, model, params, mesh)


def load_language_model(path: epath.PathLike, *, dtype: str = "float32") -> Model:
    """What `load` gives, on one device.

    Raises:
      UserError: as `load` does, or the model is no language model.
    """
    refuse_reward_model(path, open_model(path).card, "generates no text")
    return load(path, dtype=dtype)


def refuse_reward_model(path: epath.PathLike, card: ModelCard, reason: str) -> None:
    """Raises UserError where a card is of a reward model."""
    if card.members is not None:
        raise UserError(
            f"{path} is a reward model, which scores texts and {reason}: name a language model"
        )


@dataclass(frozen=True)
class Opened:
    """A model by path, whose parameters are still where they are.

    Attributes:
      lineage: where it comes from: `stage`, its parent's `lineage` and so on to the first; for a
        model of others the stage is "import".
      read: its parameters in a dtype, on a mesh.
    """

    card: ModelCard
    lineage: dict[str, Any]
    read: Callable[[LanguageModel | RewardModel, jnp.dtype, Mesh], Params]


def open_model(path: epath.PathLike, field: str | None = None) -> Opened:
    """Opens what `load` loads.

    Args:
      field: the config's that gave the path, with which a UserError begins; None for none.

    Raises:
      UserError: as `load` does.
    """
    try:
        return _open(path)
    except UserError as error:
        if field is None:
            raise
        raise UserError(f"{field} {error}") from None


def _open(path: epath.PathLike) -> Opened:
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        lineage = read_item(checkpoint, "lineage") | {"path": str(checkpoint)}
        read = functools.partial(read_params, checkpoint)
        return Opened(read_card(checkpoint), lineage, read)
    foreign = open_foreign(Path(path))

    def read_foreign(model: LanguageModel | RewardModel, dtype: jnp.dtype, mesh: Mesh) -> Params:
        shardings = flatten(rules.param_shardings(mesh, model.axes, model.shapes))
        return load_params(foreign.parameters(model), dtype, shardings.__getitem__)

    lineage = {
        "stage": "import",
        "parent": None,
        "path": str(foreign.source.absolute()),
        "tokenizer": foreign.card.tokenizer and foreign.card.tokenizer.digest,
        "tokens": 0,
        "files": digest_of_files(foreign.source),
    }
    return Opened(foreign.card, lineage, read_foreign)


def find_checkpoint(path: epath.PathLike) -> epath.Path | None:
    """The folder of the checkpoint that `path` names; None where it names something else.

    Raises:
      UserError: it is the folder of a run that has no checkpoint yet.
    """
    folder = absolute(path)
    if not folder.is_dir():
        return None
    if (folder / "params").exists() and (folder / "model").exists():
        return folder
    found = next(newest(folder), None)
    if found is None and ((folder / CHECKPOINTS).exists() or (folder / "run.json").exists()):
        raise UserError(f"{folder} has no checkpoint yet: let the run save one, then try again")
    return found


def read_card(checkpoint: epath.Path) -> ModelCard:
    """What model a checkpoint is of."""
    return ModelCard.from_json(read_item(checkpoint, "model"), checkpoint)


def read_params(
    checkpoint: epath.Path, model: LanguageModel | RewardModel, dtype: jnp.dtype, mesh: Mesh
) -> Params:
    """The parameters of a checkpoint, as `dtype` on a mesh.

    Raises:
      UserError: they cannot be read, or are not those that were saved.
    """
    template = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.shapes,
        rules.param_shardings(mesh, model.axes, model.shapes),
    )
    lineage = read_item(checkpoint, "lineage")
    stored = jnp.dtype(lineage.get("dtype", "float32"))
    template = jax.tree.map(lambda leaf: leaf.update(dtype=stored), template)
    try:
        params = read_arrays(checkpoint, "params", template)
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise UserError(f"the parameters in {checkpoint} cannot be read ({reason})") from None
    if fingerprint(params) != lineage["params"]:
        raise UserError(
            f"the parameters in {checkpoint} are not those that were saved (their fingerprint "
            "differs): take another checkpoint, or restore this one from a copy"
        )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def model_of(card: ModelCard, execution: Execution | None = None) -> LanguageModel | RewardModel:
    """The pure functions of the model of a card."""
    if card.members is None:
        return LanguageModel(card.spec, execution)
    return RewardModel(card.spec, card.members, execution)


def _on_mesh(card: ModelCard, dtype: jnp.dtype, mesh: Mesh) -> LanguageModel | RewardModel:
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise UserError(f"dtype must be float32 or bfloat16, not {dtype.name}")
    model = model_of(card, on_mesh(mesh, Execution(dtype=dtype)))
    rules.check_divisible(mesh, model.axes, model.shapes)
    return model
