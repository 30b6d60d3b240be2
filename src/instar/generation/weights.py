"""Parameters in the layout in which decoding reads them fastest."""

import dataclasses
import functools
from collections.abc import Iterator

import jax

from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Axes
from instar.models.spec import Attention, Layer, ModelSpec


def for_decoding(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params]:
    """The same function of tokens, with its layers one by one, its head untied and weights cast.

    A step of decoding takes as long as the reading of the weights. A loop over stacked layers
    copies those of a layer before it multiplies by them; a tied head is transposed, and weights in
    float32 are cast to the compute dtype, at every call of a program: here all that is done once.
    So is what a mesh asks for: a padded vocabulary, heads of keys and values for every device, and
    the place of each parameter by the rules of `model.execution`, which need not be those by which
    `params` lie. Compiling takes longer, as the program has every layer, and an untied head takes
    its memory; for as long as both sets of parameters are held, they take that of both.
    """
    execution = model.execution
    spec = with_kv_heads(unstacked(model.spec), execution.parts("kv_heads"))
    spec = spec.replace(tied=False, head_normed=False)
    laid_out = LanguageModel(spec, execution)

    def place(axes: Axes, x: jax.Array) -> jax.Array:
        # Scales and biases of norms, and routers, are used in float32.
        wide = axes.kind == "vector" or "router" in axes.names
        x = x if wide else x.astype(execution.dtype)
        if "kv_heads" in axes.names:
            x = execution.spread(x, axes.names.index("kv_heads"))
        return execution.constrain(x, axes.names)

    @jax.jit
    def convert(params: Params) -> Params:
        params = unstack(model.spec, params)
        head = params.get("head", {}) | {"kernel": model.head_table(params).T}
        params |= {"embedding": execution.vocabulary(params["embedding"]), "head": head}
        return jax.tree.map(place, laid_out.axes, params)

    return laid_out, convert(params)


def with_kv_heads(spec: ModelSpec, least: int) -> ModelSpec:
    """The spec of a model whose heads of keys and values are repeated until there are so many."""

    def change(layer: Layer) -> Layer:
        if not isinstance(layer.mixer, Attention):
            return layer
        heads = max(layer.mixer.kv_heads, least)
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, kv_heads=heads))

    return spec.map_layers(change)


def unstacked(spec: ModelSpec) -> ModelSpec:
    """The spec in which every group is one long period, repeated once."""
    return spec.replace(layers=tuple((1, period * repeat) for repeat, period in spec.layers))


def unstack(spec: ModelSpec, params: Params) -> Params:
    """Parameters of `spec` as those of `unstacked(spec)`."""

    def blocks(group: Params, repeat: int, size: int) -> Iterator[Params]:
        for index in range(repeat):
            take = functools.partial(jax.lax.slice_in_dim, start_index=index, limit_index=index + 1)
            for place in range(size):
                yield jax.tree.map(take, group[f"layer_{place}"])

    groups = {
        f"group_{i}": {
            f"layer_{number}": block
            for number, block in enumerate(blocks(params[f"group_{i}"], repeat, len(period)))
        }
        for i, (repeat, period) in enumerate(spec.layers)
    }
    return params | groups
