"""The layout for decoding computes what the stored one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import SPECS, random_params, telling

from instar.families import mixtral
from instar.generation.engine import Engine
from instar.generation.requests import Request
from instar.generation.sampling import SamplingConfig
from instar.generation.weights import for_decoding
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.sharding import rules
from instar.sharding.execution import on_mesh
from instar.sharding.mesh import MeshConfig, make_mesh

TOKENS = np.random.default_rng(0).integers(0, 37, (3, 13))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", telling(SPECS, ("mixed", "latent")))
def test_the_function_stays(name, dtype):
    model = LanguageModel(SPECS[name], Execution(jnp.dtype(dtype)))
    params = random_params(model, 2)
    laid_out, changed = for_decoding(model, params)
    before = jax.jit(model.logits)(params, TOKENS)
    after = jax.jit(laid_out.logits)(changed, TOKENS)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, laid_out.shapes)
    if dtype == "float32":
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    else:
        # By norm: XLA rounds to bfloat16 at other places in another program. Of all tokens but one,
        # which may choose another expert where two are about as good.
        errors = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
        assert np.sort(errors, axis=None)[-2] < 0.03
    for path, x in jax.tree.leaves_with_path(changed):
        if path[-1].key == "kernel":
            assert x.dtype == ("float32" if path[-2].key == "router" else dtype), path


MIXTRAL = mixtral.mixtral(depth=2, width=16, heads=2, mlp_width=10, vocab_size=37, experts=4)


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        pytest.param(SPECS["llama"], MeshConfig(fsdp=2), id="fsdp"),
        pytest.param(
            MIXTRAL, MeshConfig(fsdp=1, expert=2), id="experts", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_parameters_on_a_mesh_stay_there(spec, config):
    mesh = make_mesh(config, jax.devices()[:2])
    model = LanguageModel(spec, on_mesh(mesh, Execution()))
    params = random_params(model, 2)
    requests = [Request([1, 2, 3], SamplingConfig(6, temperature=0.0))]
    placed = jax.device_put(params, rules.param_shardings(mesh, model.axes, model.shapes))
    expected = Engine(LanguageModel(spec)).generate(params, requests)
    laid_out, changed = for_decoding(model, placed)
    found = Engine(laid_out, mesh=mesh).generate(changed, requests)
    assert found[0].tokens == expected[0].tokens
    kernel = changed["group_0"]["layer_1"]["mlp"]["up"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
