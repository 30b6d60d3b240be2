"""The layout for decoding computes what the stored one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import SPECS, quick_compilation, random_params

from instar.generation.engine import Engine
from instar.generation.requests import Request
from instar.generation.sampling import SamplingConfig
from instar.generation.weights import for_decoding
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.sharding import rules
from instar.sharding.mesh import MeshConfig, make_mesh

TOKENS = np.random.default_rng(0).integers(0, 37, (3, 13))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_the_function_stays(name, dtype):
    model = LanguageModel(SPECS[name], Execution(jnp.dtype(dtype)))
    params = random_params(model, 2)
    with quick_compilation():
        laid_out, changed = for_decoding(model, params)
        before = jax.jit(model.logits)(params, TOKENS)
        after = jax.jit(laid_out.logits)(changed, TOKENS)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, laid_out.shapes)
    if dtype == "float32":
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    else:
        # By norm: XLA rounds to bfloat16 at other places in another program.
        error = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert error < 0.03
    matrices = [x for path, x in jax.tree.leaves_with_path(changed) if path[-1].key == "kernel"]
    assert {kernel.dtype.name for kernel in matrices} == {dtype}


def test_parameters_on_a_mesh_stay_there():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1), jax.devices()[:2])
    model = LanguageModel(SPECS["llama"], rules.on_mesh(mesh, Execution()))
    params = random_params(model, 2)
    requests = [Request([1, 2, 3], SamplingConfig(6, temperature=0.0))]
    placed = jax.device_put(params, rules.param_shardings(mesh, model.axes, model.shapes))
    with quick_compilation():
        expected = Engine(LanguageModel(SPECS["llama"])).generate(params, requests)
        laid_out, changed = for_decoding(model, placed)
        found = Engine(laid_out, mesh=mesh).generate(changed, requests)
    assert found[0].tokens == expected[0].tokens
    kernel = changed["group_0"]["layer_1"]["mlp"]["up"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
