"""What devices that share heads, MLPs and the vocabulary hold and exchange, read from a program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import random_params

from instar.families import llama
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.execution import on_mesh
from instar.sharding.mesh import MeshConfig, make_mesh

SPEC = llama.llama(depth=3, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=28, vocab_size=41)
ROWS, LENGTH, DEVICES = 2, 12, 4


@pytest.fixture(scope="module")
def program() -> str:
    """The compiled loss of a model on four devices."""
    mesh = make_mesh(MeshConfig(tensor=DEVICES), jax.devices()[:DEVICES])
    model = LanguageModel(SPEC, on_mesh(mesh, Execution()))

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        hidden, _ = model.apply(params, tokens)
        weights = jnp.ones(tokens.shape)
        return next_token_sums(hidden, model.head(params), tokens, weights)["nats"]

    shardings = rules.param_shardings(mesh, model.axes, model.shapes)
    compiled = jax.jit(loss, in_shardings=(shardings, rules.replicated(mesh)))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    return compiled.lower(model.shapes, tokens).compile().as_text()


def results(program: str, operation: str) -> list[str]:
    """The types of what each `operation` gives."""
    return re.findall(rf"= (\S+|\(.*\)) {operation}(?:-start)?\(", program)


def activations(program: str, operation: str) -> int:
    """How many give whole activations: [rows, length, width], or with the first two as one."""
    whole = (f"f32[{ROWS},{LENGTH},16]", f"f32[{ROWS * LENGTH},16]")
    return sum(any(shape in found for shape in whole) for found in results(program, operation))


def test_the_residual_stream_is_split_along_the_sequence(program):
    """Between two layers no device holds more than its part of the positions."""
    carried = " ".join(results(program, "while"))
    assert f"f32[{ROWS},{LENGTH // DEVICES},16]" in carried
    assert f"f32[{ROWS},{LENGTH},16]" not in carried


def test_it_is_gathered_and_summed_twice_a_layer(program):
    """Before attention and MLP, and after either; the layers are one loop. Once more for the head,
    and for the look-up. (XLA for GPUs and TPUs makes one reduce-scatter of a sum and the slice
    that follows it.)"""
    assert activations(program, "all-gather") == 3
    assert activations(program, "all-reduce") + activations(program, "reduce-scatter") == 3


def test_no_device_holds_the_whole_vocabulary(program):
    """Neither as it is (41) nor padded (44), of the table or of the logits."""
    sizes = re.findall(r"f32\[([\d,]+)\]", program)
    shapes = {tuple(map(int, size.split(","))) for size in sizes}
    held = [shape for shape in shapes if {41, 44} & {*shape}]
    assert held and all(16 not in shape and LENGTH not in shape for shape in held)
    assert any(shape[-1] == 11 for shape in shapes)


def test_whole_logits_are_those_of_one_device():
    """A program cannot return a vocabulary in uneven parts."""
    mesh = make_mesh(MeshConfig(tensor=DEVICES), jax.devices()[:DEVICES])
    plain = LanguageModel(SPEC)
    model = plain.with_execution(on_mesh(mesh, Execution()))
    params = random_params(plain, 3)
    placed = jax.device_put(params, rules.param_shardings(mesh, model.axes, model.shapes))
    tokens = np.random.default_rng(0).integers(0, 41, (ROWS, LENGTH)).astype(np.int32)
    found = jax.jit(model.logits)(placed, tokens)
    expected = jax.jit(plain.logits)(params, tokens)
    assert found.shape == (ROWS, LENGTH, 41)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
