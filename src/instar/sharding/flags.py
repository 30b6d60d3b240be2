"""Flags of XLA that a program of collectives should run under, each with the reason for it."""

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal

Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Flag:
    """One flag. An XLA that does not know it ends the process when it starts."""

    name: str
    value: str
    reason: str


# Sources: openxla.org, "XLA:GPU optimization levels" and "XLA flags guidance"; NVIDIA JAX-Toolbox,
# "Tips for high-performance LLMs".
FLAGS: dict[Platform, tuple[Flag, ...]] = {
    "cpu": (),
    "gpu": (
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "starts collectives early and waits for them late, with products in between",
        ),
        Flag(
            "xla_gpu_enable_pipelined_all_gather",
            "true",
            "gathers the weights of the next layer of a loop while this one is computed",
        ),
        Flag(
            "xla_gpu_enable_pipelined_reduce_scatter",
            "true",
            "scatters the gradients of one layer while those of the next are computed",
        ),
        Flag(
            "xla_gpu_enable_pipelined_all_reduce",
            "true",
            "the same for gradients that are summed whole (mesh.data, mesh.slice)",
        ),
        Flag(
            "xla_gpu_enable_while_loop_double_buffering",
            "true",
            "two layers in an iteration: the weights that arrive need not be copied first",
        ),
        Flag(
            "xla_gpu_all_gather_combine_threshold_bytes",
            str(2**30),
            "one gather for all weights of a layer: few large messages fill a link, many do not",
        ),
        Flag(
            "xla_gpu_reduce_scatter_combine_threshold_bytes",
            str(2**30),
            "the same for the gradients of a layer",
        ),
    ),
    "tpu": (
        Flag(
            "xla_enable_async_all_gather",
            "true",
            "gathers weights while products are computed",
        ),
        Flag(
            "xla_tpu_enable_async_collective_fusion",
            "true",
            "runs a collective inside the products beside it",
        ),
        Flag(
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "true",
            "the same for gathers, of which FSDP has one a layer and pass",
        ),
        Flag(
            "xla_tpu_enable_async_collective_fusion_multiple_steps",
            "true",
            "spreads a long collective over several products",
        ),
        Flag(
            "xla_tpu_overlap_compute_collective_tc",
            "true",
            "lets the core compute while links carry",
        ),
        Flag(
            "xla_tpu_enable_data_parallel_all_reduce_opt",
            "true",
            "hides the sums of gradients between slices behind the backward pass",
        ),
        Flag(
            "xla_tpu_data_parallel_opt_different_sized_ops",
            "true",
            "the same where the gradients are of unlike sizes, as those of a Transformer are",
        ),
    ),
}

# Where each platform's XLA looks. What comes later in the text has the last word.
VARIABLES: dict[Platform, str] = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


def set_flags(platform: Platform, environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds a platform's flags to the environment; those that are set there already stay.

    Must run before the first use of a device: JAX reads them when it starts.
    """
    if not FLAGS[platform]:
        return
    variable = VARIABLES[platform]
    given = environment.get(variable, "").split()
    names = {word.removeprefix("--").partition("=")[0] for word in given}
    added = [f"--{f.name}={f.value}" for f in FLAGS[platform] if f.name not in names]
    environment[variable] = " ".join([*added, *given])
