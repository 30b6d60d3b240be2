"""What a run begins from, held on to: a newer checkpoint of its parent changes nothing for it.

`parents.json` in a run's folder names, by role, the checkpoint that was read at its first start and
the fingerprint of its parameters.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from instar.errors import UserError
from instar.interchange.loading import Opened, open_model, read_card
from instar.models.language_model import LanguageModel, Params
from instar.training.checkpoint_files import absolute, newest, read_item
from instar.workdir import read_json, write_json

PARENTS = "parents.json"

Read = Callable[[LanguageModel, jnp.dtype, Mesh], Params]


def pin(
    workdir: epath.PathLike,
    role: str,
    path: epath.PathLike,
    *,
    field: str | None = None,
    needed: bool = True,
) -> Opened:
    """Opens the model at `path`; for a run that has begun, the very one that it began with.

    That one is written down by `hold`, which the first reading of its parameters calls: both belong
    after the workdir is claimed. It is found again by its fingerprint, in its place or below
    `path`.

    Args:
      workdir: the run's folder, which may not exist yet.
      role: what the model is to the run ("parent", "reward"); a run's lineage names it so, too.
      path: as `open_model` takes it.
      field: the config's that gave the path; None: the one of the role's name.
      needed: whether its parameters are read at every start. Where not, a run that has a checkpoint
        goes on though the model is gone: its lineage and a card come from the run's own checkpoint,
        and reading it raises the UserError.

    Raises:
      UserError: there is no model, or not any more the one that the run began with.
    """
    workdir = epath.Path(workdir)
    own, lineage = _own_checkpoint(workdir)
    held = _held(workdir).get(role) or lineage.get(role)
    if held is None:
        opened = open_model(path, field or role)
        return dataclasses.replace(opened, read=_holding(workdir, role, opened))
    for place in _places(held, path):
        try:
            opened = open_model(place)
        except UserError:
            continue
        if identity(opened.lineage) == identity(held):
            return opened
    gone = (
        f"{role} {held['path']} is gone, or no longer the model with the fingerprint "
        f"{str(identity(held))[:12]} that {workdir} began with: restore it, or choose a new "
        "--workdir"
    )
    if not needed and lineage.get(role):
        return Opened(read_card(own), lineage[role], _refusing(gone))
    raise UserError(gone)


def check_data(workdir: epath.PathLike, data: str | dict[str, str]) -> None:
    """Sees that a run goes on with the data that its newest checkpoint was made of.

    Args:
      data: what the run's lineage says: a digest, or several by the field that names each.

    Raises:
      UserError: some of it is not what it was.
    """
    before = _own_checkpoint(epath.Path(workdir))[1].get("data")
    old, new = (x if isinstance(x, dict) else {"data": x} for x in (before, data))
    # An earlier release may not have written down all of them.
    changed = [name for name in new if old.get(name) not in (None, new[name])]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: no longer what the run in {workdir} began with: restore it, or "
            "choose a new --workdir"
        )


def hold(workdir: epath.PathLike, role: str, opened: Opened) -> None:
    """Writes down in a claimed workdir which model `opened` is; the first word holds."""
    workdir = epath.Path(workdir)
    held = _held(workdir)
    if role in held or jax.process_index() != 0:
        return
    names = ("stage", "step", "path", "params", "files")
    facts = {name: opened.lineage[name] for name in names if name in opened.lineage}
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / PARENTS, held | {role: facts})


def identity(lineage: dict[str, Any]) -> str | None:
    """What tells a model from others: the fingerprint of its parameters, or of others' files."""
    return lineage.get("params") or lineage.get("files")


def _own_checkpoint(workdir: epath.Path) -> tuple[epath.Path | None, dict[str, Any]]:
    """The newest of the run's own and its lineage; one that is damaged is passed over."""
    for checkpoint in newest(workdir):
        with contextlib.suppress(UserError):
            return checkpoint, read_item(checkpoint, "lineage")
    return None, {}


def _held(workdir: epath.Path) -> dict[str, dict[str, Any]]:
    path = workdir / PARENTS
    return read_json(path) if path.exists() else {}


def _places(held: dict[str, Any], path: epath.PathLike) -> Iterator[epath.PathLike]:
    """Where the model may lie: it stays the same when the folder that holds it is moved."""
    yield held["path"]
    yield path
    yield from newest(absolute(path))


def _holding(workdir: epath.Path, role: str, opened: Opened) -> Read:
    """`opened.read`, after which the workdir says what was read."""

    def read(model: LanguageModel, dtype: jnp.dtype, mesh: Mesh) -> Params:
        params = opened.read(model, dtype, mesh)
        hold(workdir, role, opened)
        return params

    return read


def _refusing(reason: str) -> Read:
    def read(model: LanguageModel, dtype: jnp.dtype, mesh: Mesh) -> Params:
        raise UserError(reason)

    return read
