"""Every family generates, learns and is judged: each in small, through the same code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch, random_params
from family_examples import small_spec

from instar.families.registry import FAMILIES
from instar.generation.engine import Engine
from instar.generation.requests import Request
from instar.generation.sampling import SamplingConfig
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.objectives.language import next_token_sums

pytestmark = pytest.mark.exhaustive

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_generates_what_its_forward_pass_says(name):
    spec = small_spec(name)
    model = LanguageModel(spec)
    params = random_params(model, 3)
    # A prompt of a model with a prefix ends where that does.
    end = [] if spec.prefix is None else [spec.prefix.mask_ids[0], spec.prefix.start_id]
    greedy = SamplingConfig(9, temperature=0.0)
    requests = [Request([*prompt, *end], greedy) for prompt in PROMPTS]
    completions = Engine(model).generate(params, requests)
    for request, done in zip(requests, completions, strict=True):
        whole = np.asarray([*request.prompt, *done.tokens])
        logits = np.asarray(jax.jit(model.logits)(params, whole[None, :-1]))[0]
        assert len(done.tokens) == 9
        assert done.tokens == logits[len(request.prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_with_every_parameter_and_is_judged(name):
    model = LanguageModel(small_spec(name))
    params, judge = random_params(model, 4), RewardModel(model.spec)
    batch = packed_batch(5, [[9, 7], [16]], 16, 31)

    def loss(params: dict) -> jax.Array:
        inputs = {key: batch[key] for key in ("positions", "segment_ids")}
        hidden, _ = model.apply(params, batch["tokens"], **inputs)
        head = model.head(params)
        return next_token_sums(hidden, head, batch["targets"], batch["weights"])["nats"]

    def scores(params: dict) -> jax.Array:
        return judge.packed_scores(params, batch | {"ends": jnp.asarray([8, 15, 31])})

    gradients = jax.jit(jax.grad(loss))(params)
    members = judge.from_language(params, jax.random.key(0))
    found = np.asarray(jax.jit(scores)(judge.member(members, 0)))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        unmoved = path[-1].key == "choice_bias"  # of routers: by no gradient
        assert np.isfinite(gradient).all() and (unmoved or np.any(gradient)), path
    assert np.isfinite(found).all() and len(set(found.tolist())) == 3
