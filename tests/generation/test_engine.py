"""The engine, against the full forward pass."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from examples import CAUSAL, GPT, SPECS, random_params, telling, with_mixer

from instar.errors import UserError
from instar.generation.engine import Engine
from instar.generation.requests import Request
from instar.generation.sampling import SamplingConfig
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.sharding import rules
from instar.sharding.attention import choose_attention
from instar.sharding.execution import on_mesh
from instar.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.smoke

PROMPTS = [[5, 9, 2, 30], [7], [1, 1, 1, 12, 3, 25], [11, 4], [8] * 9]
NEW, LONGEST = 8, 9
GREEDY = SamplingConfig(NEW, temperature=0.0)
DRAWN = SamplingConfig(NEW, temperature=0.9, top_k=20, top_p=0.95)


def spell(tokens: list[int]) -> str:
    """A tokenizer's `decode`: two letters for each token, so that strings may span tokens."""
    return "".join("ab cdefg"[token // 8] + "hijklmno"[token % 8] for token in tokens)


@functools.cache
def model_and_params(name: str):
    model = LanguageModel(SPECS[name])
    return model, random_params(model, 1)


@functools.cache
def engine_of(name: str) -> Engine:
    return Engine(model_and_params(name)[0], spell)


def complete(name: str, requests: list[Request], **options):
    return engine_of(name).generate(model_and_params(name)[1], requests, **options)


@functools.cache
def whole_logits(name: str):
    model, params = model_and_params(name)
    return functools.partial(jax.jit(model.logits), params)


def log_probs_of(name: str, tokens: list[int]) -> np.ndarray:
    """Of every token after these and each part of them, by one pass over all: [S, V]."""
    padded = np.zeros((1, LONGEST + NEW), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(whole_logits(name)(padded)[0, : len(tokens)]))


def full_forward_greedy(name: str, prompt: list[int], count: int = NEW) -> list[int]:
    """Argmax of the whole sequence's logits, read anew for each token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(log_probs_of(name, tokens)[-1])))
    return tokens[len(prompt) :]


@contextlib.contextmanager
def counted_compilations() -> Iterator[list]:
    found = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# --- What is generated --------------------------------------------------------------------------


@pytest.mark.parametrize("name", telling(CAUSAL, ("gpt", "mixed")))
def test_greedy_is_the_argmax_of_the_full_forward(name):
    """Prompts of unequal lengths, each as if it were alone, in batches of several sizes."""
    expected = [full_forward_greedy(name, prompt) for prompt in PROMPTS]
    for count in (1, 3, 5):
        found = complete(name, [Request(prompt, GREEDY) for prompt in PROMPTS[:count]])
        assert [done.tokens for done in found] == expected[:count]
        assert {done.reason for done in found} == {"length"}


@pytest.mark.parametrize("config", [GREEDY, dataclasses.replace(DRAWN, repetition_penalty=1.3)])
def test_log_probs_are_those_of_the_model_itself(config):
    """Of temperature 1, unfiltered and unpenalised, whatever the tokens were drawn by."""
    requests = [Request(prompt, config, seed) for seed, prompt in enumerate(PROMPTS)]
    for request, done in zip(requests, complete("llama", requests), strict=True):
        rows = log_probs_of("llama", [*request.prompt, *done.tokens])[len(request.prompt) - 1 : -1]
        expected = rows[np.arange(NEW), done.tokens]
        np.testing.assert_allclose(done.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_is_read_in_pieces(monkeypatch):
    """Longer than a piece, beside one that ends in the first piece and one that fills it."""
    monkeypatch.setattr("instar.generation.engine.PIECE", 16)
    prompts = [(list(range(40)) * 2)[:39], [7], list(range(17))]
    model, params = model_and_params("mixed")
    found = Engine(model).generate(params, [Request(p, GREEDY) for p in prompts])
    alone = jax.jit(model.logits)
    for prompt, done in zip(prompts, found, strict=True):
        padded = np.zeros((1, 48), np.int32)
        tokens = [*prompt, *done.tokens]
        padded[0, : len(tokens)] = tokens
        best = np.argmax(alone(params, padded)[0], axis=-1)
        assert done.tokens == best[len(prompt) - 1 : len(tokens) - 1].tolist()
        assert done.text is None


def test_a_row_depends_on_its_seed_and_prompt_and_not_on_its_batch():
    penalised = dataclasses.replace(DRAWN, repetition_penalty=1.2)
    configs = [DRAWN, SamplingConfig(NEW), GREEDY, penalised, SamplingConfig(3, min_p=0.1)]
    requests = [Request(p, config, seed=5) for p, config in zip(PROMPTS, configs, strict=True)]
    together = complete("llama", requests)
    for request, done in zip(requests, together, strict=True):
        assert complete("llama", [request])[0].tokens == done.tokens
    # Equal prompts and seeds draw alike, other seeds do not, and each step draws for itself.
    seeds = [Request(PROMPTS[2], SamplingConfig(NEW), seed) for seed in (3, 3, 4, 2**32 - 1)]
    first, again, *others = [done.tokens for done in complete("llama", seeds)]
    assert first == again and len({tuple(x) for x in (first, *others)}) == 3


def test_tokens_are_drawn_from_the_models_distribution():
    """The first new token of many seeds, against the softmax of the full forward pass."""
    requests = [Request(PROMPTS[0], SamplingConfig(1), seed) for seed in range(2048)]
    model, params = model_and_params("gpt")
    found = [done.tokens[0] for done in Engine(model, max_rows=1024).generate(params, requests)]
    expected = np.exp(log_probs_of("gpt", PROMPTS[0])[-1].astype(np.float64)) * len(requests)
    observed = np.bincount(found, minlength=len(expected))
    often = expected > 5
    assert often.sum() >= 3
    pairs = [(observed[often], expected[often]), (observed[~often].sum(), expected[~often].sum())]
    statistic = sum(np.sum((o - e) ** 2 / e) for o, e in pairs)
    assert statistic < often.sum() + 5 * np.sqrt(2 * often.sum())


# --- When it ends -------------------------------------------------------------------------------


def test_each_row_ends_with_its_own_stop_id():
    expected = [full_forward_greedy("gpt", prompt) for prompt in PROMPTS]
    stops = [(expected[0][3],), (), (99, expected[2][0], 98, 97, 96), (expected[3][-1],), (0,)]
    requests = [
        Request(prompt, GREEDY, stop_ids=ids) for prompt, ids in zip(PROMPTS, stops, strict=True)
    ]
    for ids, full, done in zip(stops, expected, complete("gpt", requests), strict=True):
        ends = [place for place, token in enumerate(full) if token in ids]
        kept = full[: ends[0] + 1] if ends else full
        assert done.tokens == kept and len(done.log_probs) == len(kept)
        assert done.reason == ("stop" if ends else "length")
        # The token that ends a text is no part of it.
        assert done.text == spell(kept[:-1] if ends else kept)


def test_a_batch_ends_early_on_the_device():
    """As many steps as the longest row has new tokens, counted where they are run."""
    model, params = model_and_params("llama")
    steps = []
    execution = Execution(constrain=lambda x, axes: _count(x, axes, steps))
    engine = Engine(model.with_execution(execution))
    limits = [2, 1, 5, 3, 2]
    configs = [dataclasses.replace(GREEDY, max_new_tokens=limit) for limit in limits]
    found = engine.generate(params, list(map(Request, PROMPTS, configs)))
    jax.effects_barrier()
    assert [len(done.tokens) for done in found] == limits
    assert len(steps) == 5


def _count(x: jax.Array, axes: tuple, steps: list) -> jax.Array:
    if axes == ("batch", None) and x.shape[-1] == SPECS["llama"].vocab_size:
        jax.debug.callback(lambda: steps.append(1))
    return x


def test_a_stop_string_may_span_tokens():
    full = full_forward_greedy("llama", PROMPTS[2])
    text = spell(full)
    first = next(n for n in range(2, NEW) if text.index(text[2 * n - 1 : 2 * n + 1]) == 2 * n - 1)
    stop = text[2 * first - 1 : 2 * first + 1]  # the end of one token and the start of the next
    requests = [
        Request(PROMPTS[2], GREEDY, stop_strings=("never", stop, text[2 * first :])),
        Request(PROMPTS[2], GREEDY, stop_strings=("never",)),
        Request(PROMPTS[0], GREEDY),
    ]
    cut, whole, other = complete("llama", requests)
    assert cut.text == text[: 2 * first - 1] and cut.reason == "stop"
    assert cut.tokens == full[: first + 1] and len(cut.log_probs) == first + 1
    assert whole.text == text and whole.reason == "length"
    assert other.tokens == full_forward_greedy("llama", PROMPTS[0])


# --- How ----------------------------------------------------------------------------------------


def test_a_stream_is_what_generate_returns_as_it_comes():
    stops = full_forward_greedy("gpt", PROMPTS[1])[4]
    requests = [Request(PROMPTS[1], GREEDY, stop_ids=(stops,)), Request(PROMPTS[0], GREEDY)]
    whole = complete("gpt", requests)
    found = {0: [], 1: []}
    ended = {}
    for update in engine_of("gpt").stream(model_and_params("gpt")[1], requests):
        assert update.index not in ended and len(update.tokens) == 1
        found[update.index] += update.tokens
        if update.completion is not None:
            ended[update.index] = update.completion
    assert [ended[0], ended[1]] == whole
    assert [found[0], found[1]] == [done.tokens for done in whole]


def test_nothing_is_compiled_for_values_nor_within_a_bucket_of_shapes():
    model, params = model_and_params("gpt")
    engine = Engine(model, spell)

    def run(prompts: list, seed: int = 0, stop_ids: tuple = (), **settings: object) -> None:
        config = SamplingConfig(**settings)
        engine.generate(params, [Request(p, config, seed, stop_ids) for p in prompts])

    run(PROMPTS[:3], max_new_tokens=4, top_k=3)
    run(PROMPTS[:3], max_new_tokens=4, temperature=0.0)
    with counted_compilations() as found:
        run(PROMPTS[1:], 9, (3, 4), max_new_tokens=7, temperature=0.3, top_k=7, top_p=0.5)
        run([[1] * 17, *PROMPTS[:2]], 1, max_new_tokens=12, min_p=0.2)
        run(PROMPTS[:4], 2, (1,), max_new_tokens=2, temperature=0.0)
        assert not found
        run(PROMPTS[:2], max_new_tokens=4, top_k=3)  # a batch of two is another shape
        assert found


def test_more_requests_than_rows_take_turns():
    model, params = model_and_params("gpt")
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    found = Engine(model, spell, max_rows=2).generate(params, requests)
    assert [done.tokens for done in found] == [d.tokens for d in complete("gpt", requests)]
    assert complete("gpt", []) == []


def test_a_mesh_draws_what_one_device_draws():
    """Five prompts on a mesh that splits rows in two, parameters in two and heads in two.

    Its axis `context`, which splits tokens where there is no cache, has nothing to split here.
    """
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, context=2))
    spec = with_mixer(SPECS["llama"], head_dim=6).replace(vocab_size=42, width=22)
    plain = LanguageModel(dataclasses.replace(spec, layers=_even(spec)))
    params = random_params(plain, 3)
    requests = [Request(p, c, 7) for p, c in zip(PROMPTS, [DRAWN, GREEDY] * 3, strict=False)]
    expected = Engine(plain).generate(params, requests)
    execution = on_mesh(mesh, Execution(attend=choose_attention(mesh)))
    model = plain.with_execution(execution)
    placed = jax.device_put(params, rules.param_shardings(mesh, model.axes, model.shapes))
    engine = Engine(model, mesh=mesh)
    with counted_compilations() as found:
        done = engine.generate(placed, requests)
        compiled = len(found)
        streamed = list(engine.stream(placed, requests))
        assert len(found) == compiled + 1, "each step takes the state where the last one left it"
    assert [d.tokens for d in done] == [d.tokens for d in expected]
    assert [u.completion for u in streamed if u.index == 0][-1].tokens == done[0].tokens


def _even(spec):
    """The same layers, with an MLP that divides in two."""
    return tuple(
        (n, tuple(dataclasses.replace(x, mlp=dataclasses.replace(x.mlp, width=28)) for x in period))
        for n, period in spec.layers
    )


# --- What is refused ----------------------------------------------------------------------------

BAD = {
    "no tokens": (Request([]), "prompt 1 has no tokens"),
    "unknown token": (Request([3, GPT.vocab_size]), "prompt 1 has token ids 3 to 37"),
    "negative token": (Request([-1, 4]), "prompt 1 has token ids -1 to 4"),
    "long prompt": (Request([1] * 29, SamplingConfig(1)), "29 tokens, which leave no room"),
    "bad settings": (Request([1], SamplingConfig(4, top_p=2.0)), "top_p must be in"),
    "bad seed": (Request([1], GREEDY, seed=2**32), "seed must be at least 0"),
    "empty stop": (Request([1], GREEDY, stop_strings=("",)), "must not be empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_compiled(case):
    request, message = BAD[case]
    model, params = model_and_params("gpt")
    engine = Engine(model, spell)
    requests = [Request([1], GREEDY), request]
    with counted_compilations() as found:
        for refuse in (
            lambda: engine.check(requests),
            lambda: engine.generate(params, requests),
            lambda: engine.stream(params, requests),
        ):
            with pytest.raises(UserError, match=message):
                refuse()
    assert not found


def test_a_text_ends_where_the_positions_do():
    """Those of rotary models too, whose rotations would go on."""
    model = LanguageModel(SPECS["llama"].replace(max_positions=16))
    engine, params = Engine(model), random_params(model, 0)
    requests = [Request([1] * 13, SamplingConfig(9, temperature=0.0)), Request([1, 2], GREEDY)]
    cut, whole = engine.generate(params, requests)
    assert (len(cut.tokens), cut.reason) == (3, "length")
    assert len(whole.tokens) == GREEDY.max_new_tokens
    (alone,) = engine.generate(params, [Request([1] * 13, SamplingConfig(3, temperature=0.0))])
    assert cut.tokens == alone.tokens
    with pytest.raises(UserError, match=r"prompt 0 has 16 tokens, which leave no room"):
        engine.check([Request([1] * 16, GREEDY)])


def test_stop_strings_need_a_decoder():
    with pytest.raises(UserError, match="stop_strings need an engine that was given `decode`"):
        Engine(model_and_params("gpt")[0]).check([Request([1], GREEDY, stop_strings=("x",))])
