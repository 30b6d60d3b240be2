"""Which way of computing attention a mesh gets."""

from typing import Literal

import jax
from jax.sharding import Mesh

from instar.errors import UserError
from instar.models.attention import Attend, attend
from instar.models.fused_attention import CUDNN, PLACES, SPLASH, Kernel
from instar.sharding.ring_attention import AXIS, HEADS, TOKENS, ring_attention, uneven

AttentionName = Literal["auto", "xla", "cudnn", "splash"]
KERNELS = {kernel.name: kernel for kernel in (CUDNN, SPLASH)}


def choose_attention(mesh: Mesh, name: AttentionName = "auto") -> Attend:
    """What computes the attention of rows that are in order (see `models.fused_attention`).

    Rows that are split over the mesh axis `context` go round a ring. Where they are whole, `auto`
    is the kernel of the mesh's chips for whatever it can honour, and else the reference, `xla`. A
    kernel that was asked for by its name refuses what it cannot honour:

    Raises (the result as well, when it is called):
      UserError: the named kernel is not for this mesh, or cannot honour an argument.
    """
    chip = mesh.devices.flat[0].device_kind
    if name == "xla":
        return attend
    if name == "auto":
        if mesh.shape[AXIS] > 1:
            return ring_attention(mesh)
        found = [kernel for kernel in KERNELS.values() if chip.startswith(kernel.chips)]
        return _where_possible(found[0], mesh) if found else attend
    if mesh.shape[AXIS] > 1:
        raise UserError(
            f"execution.attention {name} cannot split rows over mesh.{AXIS} = {mesh.shape[AXIS]}: "
            "leave it at auto, which does"
        )
    kernel = KERNELS[name]
    if not chip.startswith(kernel.chips):
        raise UserError(
            f"execution.attention {name} is for devices of {kernel.chips}, and this is {chip}: "
            "leave it at auto"
        )
    return _or_error(kernel, mesh)


def _where_possible(kernel: Kernel, mesh: Mesh) -> Attend:
    """The kernel where it can honour a call, and else the reference."""

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, **asked: object) -> jax.Array:
        if kernel.refuses(q, v, asked) or uneven(mesh, q, k):
            return attend(q, k, v, **asked)
        return _on_mesh(kernel, mesh, q, k, v, asked)

    return compute


def _or_error(kernel: Kernel, mesh: Mesh) -> Attend:
    """The kernel, and an error where it cannot honour a call."""

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, **asked: object) -> jax.Array:
        refused = kernel.refuses(q, v, asked) or uneven(mesh, q, k)
        if refused:
            raise UserError(
                f"execution.attention: {kernel.name} cannot honour {refused}; leave it at auto"
            )
        return _on_mesh(kernel, mesh, q, k, v, asked)

    return compute


def _on_mesh(
    kernel: Kernel, mesh: Mesh, q: jax.Array, k: jax.Array, v: jax.Array, asked: dict
) -> jax.Array:
    """The kernel on each device's rows and heads, which the compiler could not split by itself."""
    options = {name: asked[name] for name in kernel.honours if asked.get(name) is not None}

    def local(q: jax.Array, k: jax.Array, v: jax.Array, places: dict) -> jax.Array:
        return kernel.attend(q, k, v, **places, **options)

    places = {name: asked[name] for name in PLACES}
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(HEADS, HEADS, HEADS, dict.fromkeys(PLACES, TOKENS)),
        out_specs=HEADS,
        check_vma=False,
    )(q, k, v, places)
