"""Kernels that compute attention without ever writing its logits to memory.

They know rows of tokens in order and not positions. That is the same where each segment lies in one
piece, with positions that rise by one, as in the rows of every stage: then of two tokens of a
segment the later has the higher position, and their distance is that of their columns. A row that
is not so gives NaN, never a wrong number. What else of the contract (`models.attention.attend`) a
kernel cannot honour, `Kernel.refuses` tells. Padding (segment 0) sees padding before it, so that no
query is without keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from instar.models.attention import Attend

PLACES = ("positions", "kv_positions", "segment_ids", "kv_segment_ids")

# The TPU's kernel works on whole registers of so many numbers.
LANES = 128
# Tokens of the blocks of queries and keys that the TPU's kernel holds at a time, at most.
BLOCK = 512


@dataclass(frozen=True)
class Kernel:
    """A kernel, where it runs, and what it cannot do.

    Attributes:
      name: by which a config asks for it.
      chips: how JAX's names of the devices begin that have it.
      attend: the contract, with no arguments but the places and `honours`.
      honours: the optional arguments of the contract that it takes.
      limits: what is wrong with queries and values for it, if anything is.
    """

    name: str
    chips: str
    attend: Attend
    honours: tuple[str, ...]
    limits: Callable[[jax.Array, jax.Array], str | None]

    def refuses(self, q: jax.Array, v: jax.Array, asked: dict) -> str | None:
        """Which argument of a call `attend(q, k, v, **asked)` it cannot honour; None if all."""
        for name, value in asked.items():
            if value is not None and name not in PLACES + self.honours:
                return name
        for name in ("positions", "segment_ids"):
            if asked[f"kv_{name}"] is not asked[name]:
                return f"kv_{name} that are not {name}, as those of a cache"
        return self.limits(q, v)


def in_order(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Which rows hold each segment in one piece, with positions that rise by one: bool [B].

    The ids of segments must rise along the row; padding (segment 0) may be between them.
    """
    before, after = segment_ids[:, :-1], segment_ids[:, 1:]
    goes_on = (after == before) & (positions[:, 1:] == positions[:, :-1] + 1)
    begins = after > jax.lax.cummax(before, axis=1)
    return jnp.all((after == 0) | goes_on | begins, axis=1)


def _or_nan(x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return jnp.where(in_order(positions, segment_ids)[:, None, None, None], x, jnp.nan)


# --- cuDNN, for GPUs of NVIDIA ------------------------------------------------------------------


def cudnn_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    kv_positions: jax.Array,
    segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention by cuDNN, by the interface to it that JAX makes public.

    Keys after the queries are not read. That interface knows neither several texts a row, nor a
    window beside a mask, so that segments and the window are a mask [B, 1, S, S], which is read.
    """
    mask = segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    if window is not None:
        mask &= positions[:, :, None] - kv_positions[:, None, :] < window
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=scale, is_causal=True, implementation="cudnn"
    )
    return _or_nan(out, positions, segment_ids)


def cudnn_limits(q: jax.Array, v: jax.Array) -> str | None:
    """What is wrong with queries or values for cuDNN, on the oldest GPU that has it (Ampere)."""
    length, head_dim = q.shape[1], q.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q of {q.dtype}: it computes in bfloat16 and float16"
    if head_dim % 8 or head_dim > 128:
        return f"q with heads of {head_dim}: they must be a multiple of 8, up to 128"
    if v.shape[3] != head_dim:
        return f"v with heads of {v.shape[3]} beside q with heads of {head_dim}"
    if length % 2:
        return f"q with {length} tokens a row: their number must be even"
    return None


# --- Splash, for TPUs ---------------------------------------------------------------------------


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    kv_positions: jax.Array,
    segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention by JAX's kernel for TPUs, which skips blocks of keys that no query may see.

    `interpret` runs it on any device, slowly.
    """
    # Imported at its use, since it brings with it all that kernels are written with.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, head_dim = q.shape[1:]
    shape = (length, length)
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    scaled = q.astype(jnp.float32) * (head_dim**-0.5 if scale is None else scale)
    rows = (x.swapaxes(1, 2) for x in (scaled.astype(q.dtype), k, v))
    out = jax.vmap(kernel)(*rows, splash.SegmentIds(segment_ids, kv_segment_ids))
    return _or_nan(out.swapaxes(1, 2), positions, segment_ids)


def splash_limits(q: jax.Array, v: jax.Array) -> str | None:
    """What is wrong with queries or values for splash."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q of {q.dtype}: it computes in bfloat16 and float32"
    if q.shape[1] % LANES:
        return f"q with {q.shape[1]} tokens a row: they must be a multiple of {LANES}"
    return None


CUDNN = Kernel("cudnn", "NVIDIA", cudnn_attend, ("window", "scale"), cudnn_limits)
SPLASH = Kernel("splash", "TPU", splash_attend, ("window", "scale", "softcap"), splash_limits)
