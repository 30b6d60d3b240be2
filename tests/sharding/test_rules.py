"""From logical axes to the mesh."""

import jax
import pytest
from examples import with_mixer
from jax.sharding import PartitionSpec

from instar.errors import UserError
from instar.families import gpt3, llama
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.sharding import rules
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.optimizer import OptimizerConfig, make_optimizer
from instar.training.state import make_initializer, state_template

SPEC = llama.llama(depth=2, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=24, vocab_size=40)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("vocab", "embed"), (("tensor",), ("fsdp",))),
        (("positions", "embed"), (None, ("fsdp",))),
        (("layers", "embed", "heads", "head_dim"), (None, ("fsdp",), ("tensor",), None)),
        (("layers", "mlp", "embed"), (None, ("tensor",), ("fsdp",))),
        (("layers", "norm"), (None, None)),
        (
            ("batch", "sequence", None),
            (("slice", "data", "fsdp", "expert"), ("context",), None),
        ),
    ],
)
def test_partition_of_names(names, expected):
    assert rules.partition_spec(names) == PartitionSpec(*expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimiser_s_state_lies_as_its_parameters_do(name):
    model = LanguageModel(SPEC)
    mesh = make_mesh(MESH)
    optimizer = make_optimizer(OptimizerConfig(name), model.axes)
    initialize = make_initializer(model, optimizer, Initialization())
    template = state_template(initialize, mesh, model.axes)
    expected = rules.param_shardings(mesh, model.axes)
    assert jax.tree.map(lambda leaf: leaf.sharding, template.params) == expected
    params = dict(jax.tree_util.tree_leaves_with_path(expected))
    matched = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(template.opt_state):
        owners = [p for p in params if path[-len(p) :] == p]
        if owners:
            assert leaf.sharding == params[owners[0]]
            matched += 1
        else:
            # Step counts and Muon's coefficients.
            assert leaf.sharding.is_fully_replicated and leaf.size < 10
    # Two moments of each parameter under AdamW; one for each matrix in the layers under Muon.
    assert matched == 2 * len(params) - (7 if name == "muon" else 0)


@pytest.mark.parametrize(
    ("spec", "mesh", "message"),
    [
        (SPEC.replace(width=18), MeshConfig(), "18 embed cannot be split .* mesh.fsdp = 8"),
        (SPEC.replace(vocab_size=41), MESH, "41 vocab cannot be split .* mesh.tensor = 2"),
        (SPEC, MeshConfig(1, 2, 4), "2 kv_heads cannot be split .* mesh.tensor = 4"),
        (
            with_mixer(SPEC, heads=6, kv_heads=6),
            MeshConfig(1, 2, 4),
            "6 (kv_)?heads cannot be split evenly over mesh.tensor = 4: change the model's",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(spec, mesh, message):
    model = LanguageModel(spec)
    with pytest.raises(UserError, match=message):
        rules.check_divisible(make_mesh(mesh), model.axes, model.shapes)


def test_what_divides_is_accepted():
    for spec in (SPEC, gpt3.gpt3(depth=1, width=16, heads=4, vocab_size=40)):
        model = LanguageModel(spec)
        rules.check_divisible(make_mesh(MESH), model.axes, model.shapes)
