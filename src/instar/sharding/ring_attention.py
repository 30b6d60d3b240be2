"""Attention over rows that are split along the mesh axis `context`: a ring (Liu et al. 2023)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from instar.errors import UserError
from instar.models import tiled_attention as tiled
from instar.models.attention import Attend
from instar.models.tiled_attention import Beside, Form, Places
from instar.sharding.rules import RULES, axes_told

AXIS = "context"
HEADS = PartitionSpec(*(RULES[name] for name in ("batch", "sequence", "heads")))
TOKENS = PartitionSpec(*(RULES[name] for name in ("batch", "sequence")))


def ring_attention(mesh: Mesh) -> Attend:
    """The attention of the contract (see `models.attention.attend`) for rows split over `context`.

    Each device keeps its queries. Keys and values, with their positions and segments, go once
    around the ring, and each device adds what its queries see of them to a running softmax, in
    float32 (in float64 for float64 inputs). Since places travel with the keys, every mask of the
    contract holds, in whatever order the tokens of a row lie along the ring. Where no query of a
    tile sees any of its keys, the tile is not computed: `sharding.inputs` lays rows out so that
    each device has about as many of the others.

    The backward pass is a second ring, on which the gradients of keys and values travel with them
    and come home. It computes the weights again from the softmax's denominators, so that a device
    holds its own part of a row and one more; to differentiate the loop would keep all of them.
    `bias_slopes` get no gradient.

    The function raises:
      UserError: the rows, their tokens or the heads do not divide over the mesh.
    """

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        positions: jax.Array,
        kv_positions: jax.Array,
        segment_ids: jax.Array,
        kv_segment_ids: jax.Array,
        window: int | None = None,
        prefix_length: jax.Array | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        bias_slopes: jax.typing.ArrayLike | None = None,
        bias_rounded: bool | None = None,
    ) -> jax.Array:
        problem = uneven(mesh, q, k)
        if problem is not None:
            raise UserError(f"{problem}: change their number or the mesh")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        form = Form(window, scale, softcap, bool(bias_rounded))
        slopes = bias_slopes
        if slopes is not None:
            slopes = jnp.asarray(slopes, jnp.promote_types(q.dtype, jnp.float32))
        at, kv_at = Places(positions, segment_ids), Places(kv_positions, kv_segment_ids)
        return _ring(mesh, form, q, k, v, at, kv_at, Beside(prefix_length, slopes))

    return attend


def uneven(mesh: Mesh, q: jax.Array, k: jax.Array) -> str | None:
    """What of queries or keys the mesh cannot split evenly, in words; None if nothing."""
    for name, size, axes in (
        ("rows", q.shape[0], RULES["batch"]),
        ("tokens of a row", q.shape[1], RULES["sequence"]),
        ("keys of a row", k.shape[1], RULES["sequence"]),
        ("heads", q.shape[2], RULES["heads"]),
        ("heads of keys", k.shape[2], RULES["kv_heads"]),
    ):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            return f"{size} {name} cannot be split evenly over {axes_told(mesh, axes)} = {parts}"
    return None


# --- The ring, and its derivative ---------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(
    mesh: Mesh,
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Places,
    kv_at: Places,
    beside: Beside,
) -> jax.Array:
    return _forward(mesh, form, q, k, v, at, kv_at, beside)[0]


def _specs(beside: Beside) -> tuple:
    """How (q, k, v, at, kv_at, beside) lie on the mesh."""
    prefix = None if beside.prefix_length is None else PartitionSpec(RULES["batch"])
    slopes = None if beside.slopes is None else PartitionSpec(RULES["heads"])
    tokens = Places(TOKENS, TOKENS)
    return HEADS, HEADS, HEADS, tokens, tokens, Beside(prefix, slopes)


def _forward(mesh: Mesh, form: Form, *inputs: object) -> tuple[jax.Array, tuple]:
    once_around = jax.shard_map(
        partial(_mix, form, mesh.shape[AXIS]),
        mesh=mesh,
        in_specs=_specs(inputs[-1]),
        out_specs=(HEADS, HEADS),
        check_vma=False,
    )
    out, log_z = (checkpoint_name(x, "attention") for x in once_around(*inputs))
    return out, (inputs, out, log_z)


def _backward(mesh: Mesh, form: Form, saved: tuple, g: jax.Array) -> tuple:
    inputs, out, log_z = saved
    once_around = jax.shard_map(
        partial(_gradients, form, mesh.shape[AXIS]),
        mesh=mesh,
        in_specs=(*_specs(inputs[-1]), HEADS, HEADS, HEADS),
        out_specs=(HEADS, HEADS, HEADS),
        check_vma=False,
    )
    return *once_around(*inputs, out, log_z, g), None, None, None


_ring.defvjp(_forward, _backward)


# --- What one device does -----------------------------------------------------------------------


def _pass_on(x: object, size: int) -> object:
    """Gives x to the device after this one, and takes that of the device before."""
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)])


def _mix(
    form: Form,
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Places,
    kv_at: Places,
    beside: Beside,
) -> tuple[jax.Array, jax.Array]:
    """The result [B, S, heads, V], S local, and the softmax's log denominators [B, S, heads, 1]."""
    queries = tiled.cut_queries(q, k.shape[2])
    places = tiled.cut_places(at)

    def absorb(tile: tuple, keys: tuple) -> tiled.Running:
        """The softmax of one tile of queries with the keys that are here now."""
        q, at, state = tile

        def add(state: tiled.Running, piece: tuple) -> tuple:
            k, v, kv_at = piece
            seen = tiled.sees(form, at, kv_at, beside)
            added = partial(tiled.add_tile, form, q, k, v, at, kv_at, beside)
            return jax.lax.cond(seen, added, lambda state: state, state), None

        return jax.lax.scan(add, state, keys)[0]

    def turn(carry: tuple, _: None) -> tuple:
        keys, state = carry
        following = _pass_on(keys, size)  # first, so that it is under way while this computes
        state = jax.lax.map(lambda tile: absorb(tile, keys), (queries, places, state))
        return (following, state), None

    keys = (tiled.cut_keys(k), tiled.cut_keys(v), tiled.cut_places(kv_at))
    (_, state), _ = jax.lax.scan(turn, (keys, tiled.start(queries, v.shape[-1])), length=size)
    mixed, log_z = map(tiled.join_queries, tiled.finish(state))
    return mixed.astype(q.dtype), log_z


def _gradients(
    form: Form,
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: Places,
    kv_at: Places,
    beside: Beside,
    out: jax.Array,
    log_z: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v."""
    change = jnp.sum(g.astype(log_z.dtype) * out.astype(log_z.dtype), axis=-1, keepdims=True)
    floats = (tiled.cut_queries(x, k.shape[2]) for x in (q, g, log_z, change))
    queries = (*floats, tiled.cut_places(at))

    def absorb(to_keys: tuple, tile: tuple, keys: tuple) -> tuple:
        """One tile of queries and the keys that are here now: adds to the gradients of both."""
        queries, to_queries = tile

        def add(to_queries: jax.Array, piece: tuple) -> tuple:
            (k, v, kv_at), to_keys = piece
            seen = tiled.sees(form, queries[-1], kv_at, beside)
            added = partial(tiled.add_gradients, form, queries, k, v, kv_at, beside)
            return jax.lax.cond(seen, added, lambda *same: same, to_queries, to_keys)

        to_queries, to_keys = jax.lax.scan(add, to_queries, (keys, to_keys))
        return to_keys, to_queries

    def turn(carry: tuple, _: None) -> tuple:
        keys, to_keys, to_queries = carry
        following = _pass_on(keys, size)
        to_keys, to_queries = jax.lax.scan(
            partial(absorb, keys=keys), to_keys, (queries, to_queries)
        )
        return (following, _pass_on(to_keys, size), to_queries), None

    keys = (tiled.cut_keys(k), tiled.cut_keys(v), tiled.cut_places(kv_at))
    zeros = tuple(jnp.zeros(x.shape, log_z.dtype) for x in (*keys[:2], queries[0]))
    carry, _ = jax.lax.scan(turn, (keys, zeros[:2], zeros[2]), length=size)
    _, (to_k, to_v), to_q = carry
    found = (tiled.join_queries(to_q), tiled.join_keys(to_k), tiled.join_keys(to_v))
    return tuple(x.astype(like.dtype) for x, like in zip(found, (q, k, v), strict=True))
