"""The mixers of a Transformer: modules that let tokens attend to one another.

A mixer makes of tokens their queries and what later tokens need of them, which is what a cache
keeps (`project`). From these it goes on in two ways that give the same: over tokens of the same
pass (`mix`), and over what a cache kept (`recall`). Both are given the attention itself, which
knows places already.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from instar.models import spec as specs
from instar.models.attention import Attend, alibi_slopes
from instar.models.layers import Norm, Projection, Sides, Spread
from instar.models.parameters import Initialization
from instar.models.rotary import Turns, rotate

Kept = tuple[jax.Array, ...]  # what a cache keeps of tokens: arrays [B, S, heads, size]


class Attention(nnx.Module):
    """The parameters of attention: queries, keys and values in, the mixed values out."""

    def __init__(
        self,
        spec: specs.Attention,
        width: int,
        *,
        initialization: Initialization,
        residual_scale: jax.Array,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        embed = (("embed", width),)
        head_dim = ("head_dim", spec.head_dim)

        def projection(
            inputs: Sides, outputs: Sides, bias: bool, scale: jax.Array | float = 1.0
        ) -> Projection:
            return Projection(
                inputs, outputs, bias=bias, initialization=initialization, rngs=rngs, scale=scale
            )

        self.query = projection(embed, (("heads", spec.heads), head_dim), spec.bias)
        self.key = projection(embed, (("kv_heads", spec.kv_heads), head_dim), spec.bias)
        self.value = projection(embed, (("kv_heads", spec.kv_heads), head_dim), spec.bias)
        self.out = projection(
            (("heads", spec.heads), head_dim), embed, spec.out_bias, residual_scale
        )
        if spec.qk_norm is not None:
            whole = spec.qk_norm_over == "all"
            heads, kv_heads = ("heads", spec.heads), ("kv_heads", spec.kv_heads)
            self.query_norm = Norm(spec.qk_norm, *([heads] if whole else []), head_dim)
            self.key_norm = Norm(spec.qk_norm, *([kv_heads] if whole else []), head_dim)

    def project(
        self, x: jax.Array, turns: Turns | None, spread: Spread | None = None
    ) -> tuple[jax.Array, Kept]:
        """x [B, S, embed] -> q [B, S, heads, D], k and v [B, S, kv_heads, D]; q and k turned.

        There are more kv_heads than the spec's where `spread` repeats their weights.
        """
        q, k, v = self.query(x), self.key(x, spread), self.value(x, spread)
        if self.spec.qk_norm is not None:
            # Where each key is there as often as the others, their mean square is the same.
            whole = self.spec.qk_norm_over == "all"
            q, k = self.query_norm(q), self.key_norm(k, spread if whole else None)
        if self.spec.rotary is not None:
            style = self.spec.rotary.style
            q, k = rotate(q, turns, style), rotate(k, turns, style)
        return q, (k, v)

    def mix(self, q: jax.Array, kept: Kept, attend: Attend) -> jax.Array:
        """The output [B, S, embed] of queries over keys and values."""
        spec = self.spec
        mixed = attend(
            q,
            *kept,
            window=spec.window,
            scale=spec.scale,
            softcap=spec.softcap,
            bias_slopes=alibi_slopes(spec.heads) if spec.alibi else None,
            bias_rounded=spec.alibi_rounded or None,
        )
        return self.out(mixed)

    recall = mix


class Latent(nnx.Module):
    """The parameters of multi-head latent attention; see `spec.Latent`.

    Over a cache no key or value is ever made. A query q compared with the key K c of a latent c is
    K^T q compared with c, and the mean of values V c is V of the mean of latents: all heads read
    the one latent (DeepSeek-AI 2024, 2405.04434, section 2.1.2).
    """

    def __init__(
        self,
        spec: specs.Latent,
        width: int,
        *,
        initialization: Initialization,
        residual_scale: jax.Array,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        embed, heads = (("embed", width),), ("heads", spec.heads)
        options = {"initialization": initialization, "rngs": rngs}
        read = embed
        if spec.query_rank is not None:
            latent = (("latent", spec.query_rank),)
            self.query_latent = Projection(embed, latent, bias=spec.bias, **options)
            self.query_norm = Norm(spec.norm, ("norm", spec.query_rank))
            read = (("rank", spec.query_rank),)
        self.query = Projection(read, (heads, ("head_dim", spec.query_dim)), bias=False, **options)
        kept, rank = (("latent", spec.cached_dim),), (("rank", spec.rank),)
        self.latent = Projection(embed, kept, bias=spec.bias, **options)
        self.latent_norm = Norm(spec.norm, ("norm", spec.rank))
        self.key = Projection(rank, (heads, ("head_dim", spec.head_dim)), bias=False, **options)
        values = (heads, ("value_dim", spec.value_dim))
        self.value = Projection(rank, values, bias=False, **options)
        self.out = Projection(values, embed, bias=spec.bias, scale=residual_scale, **options)

    def project(
        self, x: jax.Array, turns: Turns, spread: Spread | None = None
    ) -> tuple[jax.Array, Kept]:
        """x [B, S, embed] -> q [B, S, heads, query_dim]; the latent and the key [B, S, 1, ...].

        There is nothing to `spread`: each device has all of both.
        """
        spec, style = self.spec, self.spec.rotary.style
        if spec.query_rank is not None:
            q = self.query(self.query_norm(self.query_latent(x)))
        else:
            q = self.query(x)
        own, shared = jnp.split(q, [spec.head_dim], axis=-1)
        latent, key = jnp.split(self.latent(x)[:, :, None], [spec.rank], axis=-1)
        q = jnp.concatenate([own, rotate(shared, turns, style)], axis=-1)
        kept = jnp.concatenate([self.latent_norm(latent), rotate(key, turns, style)], axis=-1)
        return q, (kept,)

    def mix(self, q: jax.Array, kept: Kept, attend: Attend) -> jax.Array:
        """The output [B, S, embed], by way of the keys and values of all heads."""
        latent, key = jnp.split(kept[0][:, :, 0], [self.spec.rank], axis=-1)
        own, v = self.key(latent), self.value(latent)
        shared = jnp.broadcast_to(key[:, :, None], (*own.shape[:3], key.shape[-1]))
        k = jnp.concatenate([own, shared], axis=-1)
        return self.out(attend(q, k, v, scale=self.spec.scale))

    def recall(self, q: jax.Array, kept: Kept, attend: Attend) -> jax.Array:
        """The same, by way of one latent for all heads."""
        to_key, to_value = (each.kernel[...].astype(q.dtype) for each in (self.key, self.value))
        own, shared = jnp.split(q, [self.spec.head_dim], axis=-1)
        q = jnp.concatenate([jnp.einsum("bshd,rhd->bshr", own, to_key), shared], axis=-1)
        # Of the mean of what is kept, that of the latents: to cut them out first would copy them.
        mixed = attend(q, *kept, *kept, scale=self.spec.scale)[..., : self.spec.rank]
        return self.out(jnp.einsum("bshr,rhd->bshd", mixed, to_value))
