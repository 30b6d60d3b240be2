"""What a config says by the name of the hardware alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from instar.arguments import nearest
from instar.errors import UserError
from instar.models.transformer import Remat
from instar.sharding.flags import Platform, set_flags


@dataclass(frozen=True)
class Preset:
    """How a Transformer of 1 to 10 billion parameters trains on one kind of machine.

    Attributes:
      platform: whose flags of XLA are set.
      mesh: sizes of `MeshConfig`.
      rows: of a microbatch, of about 4,096 tokens each; None: all of a step.
    """

    platform: Platform
    mesh: Mapping[str, int]
    remat: Remat
    rows: int | None
    compute_dtype: str = "bfloat16"

    def values(self) -> dict[str, Any]:
        """The fields of a `RunConfig`."""
        return {
            "mesh": {"fsdp": 1, **self.mesh},
            "execution": {"remat": self.remat},
            "batch": {"microbatch": self.rows},
            "compute_dtype": self.compute_dtype,
        }


# To begin with, by arithmetic: masters, moments and gradients of 8 billion parameters take 128 GB,
# and a row on each device 1 GB for the residual stream of 32 layers and as much for what attention
# gave, which 80 GB (H100) and 95 GB (v5p) have room for, and 16 and 32 GB (v5e, v4, v6e) do not at
# every size of model. Nodes of 8 GPUs are far from one another: weights are gathered inside a node,
# and only gradients go between them. The slices of TPUs named here are one torus each. Google
# counts cores in the names of v4 and v5p, two of which are one device: v5p-64 has 32.
PRESETS: dict[str, Preset] = {
    "cpu": Preset("cpu", {"fsdp": -1}, "none", None, "float32"),
    "a100-8": Preset("gpu", {"fsdp": 8}, "attention", 8),
    "h100-1": Preset("gpu", {}, "attention", 1),
    "h100-8": Preset("gpu", {"fsdp": 8}, "attention", 8),
    "h100-64": Preset("gpu", {"slice": 8, "fsdp": 8}, "attention", 64),
    "h200-8": Preset("gpu", {"fsdp": 8}, "attention", 16),
    "b200-8": Preset("gpu", {"fsdp": 8}, "attention", 16),
    "v4-64": Preset("tpu", {"fsdp": 32}, "full", 32),
    "v5p-8": Preset("tpu", {"fsdp": 4}, "attention", 4),
    "v5p-64": Preset("tpu", {"fsdp": 32}, "attention", 32),
    "v5p-512": Preset("tpu", {"fsdp": 256}, "attention", 256),
    "v5e-256": Preset("tpu", {"fsdp": 256}, "full", 256),
    "v6e-256": Preset("tpu", {"fsdp": 256}, "full", 256),
}


def preset(name: str) -> Preset:
    """The preset of that name. Raises UserError where there is none."""
    if name not in PRESETS:
        raise UserError(
            f"hardware: there is none named {name!r}; {nearest(name, PRESETS, 'the names')}"
        )
    return PRESETS[name]


def with_preset(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a config, with those that the preset of its `hardware` gives beneath them."""
    name = values.get("hardware")
    return _over(preset(name).values(), values) if isinstance(name, str) else values


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        merged[key] = _over(below[key], value) if nested else value
    return merged


def start_hardware(name: str) -> None:
    """Sets the flags of XLA that the hardware of that name runs under; before JAX starts."""
    set_flags(preset(name).platform)
