"""From logical axes to the mesh."""

import jax
import pytest
from examples import with_mixer
from jax.sharding import PartitionSpec

from instar.errors import UserError
from instar.families import gpt3, llama, mixtral
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.sharding import rules
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.sharding.rules import RULES
from instar.training.optimizer import OptimizerConfig, make_optimizer
from instar.training.state import make_initializer, state_template

SPEC = llama.llama(depth=2, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=24, vocab_size=40)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("vocab", "embed"), (40, 16), (("tensor",), ("fsdp",))),
        (("positions", "embed"), (9, 16), (None, ("fsdp",))),
        (
            ("layers", "embed", "heads", "head_dim"),
            (3, 16, 4, 5),
            (None, ("fsdp",), ("tensor",), None),
        ),
        (("layers", "mlp", "embed"), (3, 24, 16), (None, ("tensor",), ("fsdp",))),
        (("layers", "norm"), (3, 16), (None, None)),
        # What does not divide leaves its axes to `embed`, where that divides over both.
        (("vocab", "embed"), (41, 16), (None, ("tensor", "fsdp"))),
        (("embed", "vocab"), (16, 41), (("tensor", "fsdp"), None)),
        (
            ("layers", "embed", "kv_heads", "head_dim"),
            (3, 16, 1, 5),
            (None, ("tensor", "fsdp"), None, None),
        ),
        (("vocab", "embed"), (41, 18), (None, ("fsdp",))),
        (("layers", "kv_heads", "head_dim"), (3, 1, 5), (None, None, None)),
    ],
)
def test_where_parameters_lie(names, shape, expected):
    assert rules.param_spec(make_mesh(MESH), names, shape) == PartitionSpec(*expected)


def test_activations_lie_along_the_axes_that_divide_them():
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))

    def spec(*shape: int) -> PartitionSpec:
        return rules.activation_spec(mesh, ("batch", "residual", None), shape)

    batch = RULES["batch"]
    assert spec(4, 12, 16) == PartitionSpec(batch, ("context", "tensor"), None)
    assert spec(4, 6, 16) == PartitionSpec(batch, ("context",), None)
    assert spec(4, 1, 16) == PartitionSpec(batch, None, None)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimiser_s_state_lies_as_its_parameters_do(name):
    model = LanguageModel(SPEC)
    mesh = make_mesh(MESH)
    optimizer = make_optimizer(OptimizerConfig(name), model.axes)
    initialize = make_initializer(model, optimizer, Initialization())
    template = state_template(initialize, mesh, model.axes)
    expected = rules.param_shardings(mesh, model.axes, model.shapes)
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
        (
            with_mixer(SPEC, heads=12, kv_heads=3),
            MeshConfig(1, 2, 4),
            "3 kv_heads cannot be split or repeated evenly over mesh.tensor = 4: change the model",
        ),
        (
            with_mixer(SPEC, heads=6, kv_heads=6),
            MeshConfig(1, 2, 4),
            "6 (kv_)?heads cannot be split (or repeated )?evenly over mesh.tensor = 4: change the",
        ),
        (
            mixtral.mixtral(depth=2, width=16, heads=4, vocab_size=40, experts=6),
            MeshConfig(fsdp=2, expert=4),
            "6 experts cannot be split evenly over mesh.expert = 4: change the model's experts",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(spec, mesh, message):
    model = LanguageModel(spec)
    with pytest.raises(UserError, match=message):
        rules.check_divisible(make_mesh(mesh), model.axes, model.shapes)


def test_what_divides_is_accepted():
    odd = SPEC.replace(vocab_size=41)
    for spec in (SPEC, gpt3.gpt3(depth=1, width=16, heads=4, vocab_size=40), odd):
        model = LanguageModel(spec)
        for mesh in (MESH, MeshConfig(1, 2, 4)):
            rules.check_divisible(make_mesh(mesh), model.axes, model.shapes)
