"""MOSS (Sun et al. 2023) and CodeGen (Nijkamp et al. 2022, 2203.13474): GPT-J in four parts.

Queries, values and keys lie in one matrix, in this order and apart for each quarter of the heads,
as the machines that CodeGen was trained on had them. MOSS is CodeGen under another name.
"""

from instar.families import gptj
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout, Tensor, fused, linear
from instar.models.spec import Layer, ModelSpec

# Layers, width, heads.
SIZES: dict[str, tuple[int, int, int]] = {"16b": (34, 6144, 24)}

_PART = "(four quarter) head_dim -> four (quarter head_dim)"
QVK = dict.fromkeys(("mixer.query", "mixer.value", "mixer.key"), _PART)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a MossForCausalLM or a CodeGenForCausalLM."""
    heads = config.integer("n_head")
    if heads % 4:
        raise config.error("n_head", f"({heads}) is not a multiple of 4")
    return gptj.read_config(config)


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "transformer.h.{layer}."
    return [
        *gptj.mlp_tensors(layer, stem),
        *fused(f"{stem}attn.qkv_proj", QVK, False, "four rows -> (four rows)"),
        *linear(f"{stem}attn.out_proj", "mixer.out", "heads head_dim", "embed"),
    ]


FAMILY = Family(
    "moss",
    gptj.gptj,
    SIZES,
    hub=HubFormat(
        ("codegen", "moss"),
        "CodeGenForCausalLM",
        read_config,
        gptj.write_config,
        Layout(gptj.outer_tensors, layer_tensors, gptj.MASKS, prefix="transformer."),
    ),
)
