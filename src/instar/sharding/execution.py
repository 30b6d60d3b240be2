"""A model's execution, laid out on a mesh."""

import dataclasses
import functools

from jax.sharding import Mesh

from instar.models.transformer import Execution
from instar.sharding.experts import make_dispatch
from instar.sharding.rules import RULES, Rules, constrain, parts


def on_mesh(mesh: Mesh, execution: Execution, rules: Rules = RULES) -> Execution:
    """The same execution, with what depends on the mesh."""
    return dataclasses.replace(
        execution,
        constrain=constrain(mesh, rules),
        parts=functools.partial(parts, mesh, rules=rules),
        dispatch=make_dispatch(mesh, rules),
    )
