"""Small models and inputs that the numerical tests share, all drawn from fixed seeds."""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
import pytest

from instar.families import chatglm1, deepseek_v3, gpt3, llama
from instar.models.language_model import LanguageModel
from instar.models.rotary import Yarn
from instar.models.spec import Attention, Experts, Layer, Mlp, ModelSpec, Norm, Rotary

# Sizes are odd where they may be, and heads x head_dim is not the width: a transposed or confused
# axis then fails on its shape or shows in the values.
GPT = gpt3.gpt3(
    depth=3, width=21, heads=3, head_dim=5, mlp_width=33, vocab_size=37, max_positions=29
)
LLAMA = llama.llama(
    depth=2, width=22, heads=6, kv_heads=2, head_dim=10, mlp_width=29, vocab_size=41, qk_norm=True
)

_LAYER_NORM, _RMS_NORM = Norm("layer", 1e-5, bias=True), Norm("rms", 1e-6)
_LOCAL = Layer(
    Attention(heads=4, kv_heads=2, head_dim=6, bias=True, window=3, rotary=Rotary(theta=100.0)),
    Mlp(17, "gelu", gated=True, bias=True),
    _RMS_NORM,
)
_PARTIAL = Layer(
    Attention(
        heads=3,
        kv_heads=1,
        head_dim=8,
        out_bias=True,
        rotary=Rotary(fraction=0.5, style="interleaved"),
        qk_norm=_LAYER_NORM,
        softcap=2.5,
        scale=0.7,
    ),
    Mlp(31, "silu"),
    Norm("layer", 1e-3),
)
_ALIBI = Layer(
    Attention(heads=6, kv_heads=3, head_dim=7, alibi=True, window=5),
    Mlp(13, "relu", bias=True),
    _LAYER_NORM,
)
# Several groups, and a period of two unlike layers; six heads of ALiBi are no power of two.
MIXED = ModelSpec(
    vocab_size=43,
    width=19,
    max_positions=64,
    layers=((2, (_LOCAL, _PARTIAL)), (1, (_ALIBI,))),
    final_norm=None,
)
# A Mixtral's experts, beside the other ways to score them and a layer without any.
EXPERTS = ModelSpec(
    vocab_size=31,
    width=18,
    max_positions=64,
    layers=(
        (2, (dataclasses.replace(_LOCAL, mlp=Experts(Mlp(7, "silu", gated=True), 5, 2)), _LOCAL)),
        (1, (dataclasses.replace(_PARTIAL, mlp=Experts(Mlp(9, "gelu"), 4, 3, "sigmoid", False)),)),
    ),
    final_norm=_RMS_NORM,
)
# Of twelve heads four have slopes that bfloat16 rounds, and so all that these are multiplied by.
_ROUNDED = dataclasses.replace(_ALIBI.mixer, heads=12, alibi_rounded=True)
# Every arrangement of a layer but the usual one, and all that may surround layers.
_ONE_PLUS = Norm("rms", 1e-5, offset=1.0)
_WHOLE_NORM = dataclasses.replace(_LOCAL.mixer, qk_norm=_RMS_NORM, qk_norm_over="all")
WIRED = ModelSpec(
    vocab_size=41,
    width=20,
    max_positions=64,
    layers=(
        (
            2,
            (
                dataclasses.replace(_LOCAL, arrangement="post_norm"),
                dataclasses.replace(_LOCAL, arrangement="output_norm", mixer=_WHOLE_NORM),
            ),
        ),
        (1, (dataclasses.replace(_PARTIAL, arrangement="sandwich", norm=_ONE_PLUS),)),
        (
            1,
            (
                dataclasses.replace(_ALIBI, arrangement="parallel", mixer=_ROUNDED),
                dataclasses.replace(_LOCAL, arrangement="shared"),
                dataclasses.replace(_PARTIAL, arrangement="normed", residual_scale=1.7),
            ),
        ),
    ),
    final_norm=_LAYER_NORM,
    learned_positions=True,
    position_offset=2,
    embedding_width=12,
    embedding_scale=1.3,
    embedding_norm=_LAYER_NORM,
    head_bias=True,
    logit_softcap=3.0,
)
# A text begins with what all of it sees; its special tokens come up often in a small vocabulary.
PREFIX = chatglm1.chatglm1(
    depth=2, width=18, heads=3, head_dim=8, mlp_width=11, vocab_size=13, start_id=5, mask_ids=(6, 7)
)
# Latents in the place of keys and values, and experts in groups beside a shared one.
LATENT = deepseek_v3.deepseek_v3(
    depth=3,
    width=22,
    heads=3,
    head_dim=6,
    rotary_dim=8,
    value_dim=5,
    rank=9,
    query_rank=7,
    bias=True,
    rotary=Rotary(
        theta=100.0,
        style="interleaved",
        scaling=Yarn(4.0, 16, 3.0, 0.5, mscale=2, mscale_all_dim=3),
    ),
    mlp_width=13,
    experts=6,
    experts_per_token=2,
    expert_width=4,
    shared_experts=2,
    groups=3,
    top_groups=2,
    router_bias=False,
    scale=1.7,
    vocab_size=37,
)
SPECS = {"gpt": GPT, "llama": LLAMA, "mixed": MIXED, "experts": EXPERTS, "wired": WIRED}
SPECS |= {"prefix": PREFIX, "latent": LATENT}
# Those in which a token never sees a later one.
CAUSAL = {name: spec for name, spec in SPECS.items() if spec.prefix is None}
# Of SPECS, what tests that compile much take; `-m exhaustive` takes the others.
TELLING = ("gpt", "mixed", "prefix", "latent")


def telling(names: Iterable[str], kept: Iterable[str] = TELLING) -> list:
    """`names` as a test's parameters, of which all but those that are `kept` are exhaustive."""
    slow = pytest.mark.exhaustive
    return [name if name in kept else pytest.param(name, marks=slow) for name in names]


def random_params(model: LanguageModel, seed: int, dtype: type = np.float32) -> dict:
    """Parameters with no zeros and no ones: biases and the scales of norms are random too."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, values = path[-1].key, rng.standard_normal(leaf.shape)
        if name == "scale":
            values = 1 + 0.4 * values
        elif name.endswith("bias"):
            values = 0.5 * values
        elif name == "kernel":
            values = 0.4 * values
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, model.shapes)


def packed_batch(seed: int, lengths: list[list[int]], length: int, vocab_size: int) -> dict:
    """Rows [B, length] of documents with these lengths, then padding; as the loader makes them.

    The weights are uneven, and 0 on padding and on the last token of each document.
    """
    rng = np.random.default_rng(seed)
    batch = {
        "tokens": np.zeros((len(lengths), length), np.int32),
        "targets": np.zeros((len(lengths), length), np.int32),
        "weights": np.zeros((len(lengths), length), np.float32),
        "positions": np.zeros((len(lengths), length), np.int32),
        "segment_ids": np.zeros((len(lengths), length), np.int32),
    }
    for row, documents in enumerate(lengths):
        start = 0
        for segment, size in enumerate(documents, start=1):
            span = (row, slice(start, start + size))
            tokens = rng.integers(0, vocab_size, size + 1)
            batch["tokens"][span], batch["targets"][span] = tokens[:-1], tokens[1:]
            batch["weights"][span] = rng.uniform(0.5, 2.0, size)
            batch["weights"][row, start + size - 1] = 0
            batch["positions"][span] = np.arange(size)
            batch["segment_ids"][span] = segment
            start += size
        assert start <= length
    return batch


def with_mixer(spec: ModelSpec, **changes: object) -> ModelSpec:
    """`spec` with the attention of every layer changed."""

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **changes))

    return spec.replace(layers=tuple((n, tuple(map(change, period))) for n, period in spec.layers))
