"""Parameters in the layout in which decoding reads them fastest."""

import functools
from collections.abc import Iterator

import jax

from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Axes
from instar.models.spec import ModelSpec


def for_decoding(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params]:
    """The same function of tokens, with its layers one by one, its head untied and weights cast.

    A step of decoding takes as long as the reading of the weights. A loop over stacked layers
    copies those of a layer before it multiplies by them; a tied head is transposed, and weights in
    float32 are cast to the compute dtype, at every call of a program: here all that is done once.
    Compiling takes longer, as the program has every layer, and an untied head takes its memory;
    for as long as both sets of parameters are held, they take that of both.
    """
    laid_out = LanguageModel(unstacked(model.spec).replace(tied=False), model.execution)

    def cast(axes: Axes, x: jax.Array) -> jax.Array:
        # Scales and biases of norms, and routers, are used in float32.
        wide = axes.kind == "vector" or "router" in axes.names
        return x if wide else x.astype(model.execution.dtype)

    @jax.jit
    def convert(params: Params) -> Params:
        params = unstack(model.spec, params)
        if model.spec.tied:
            params |= {"head": {"kernel": params["embedding"].T}}
        return jax.tree.map(cast, laid_out.axes, params)

    return laid_out, convert(params)


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
