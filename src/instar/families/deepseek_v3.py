"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, 2412.19437, section 2.1): latents, and many small experts.

Where the paper says otherwise or nothing, this is what transformers and the published code do:

- a group of experts is as good as its best two, whatever number of them a token chooses in each;
- experts outside the chosen groups are out of the question, with whatever bias;
- the norms of latents have an epsilon of their own, 1e-6;
- with YaRN all of a logit grows, not what turned alone.

The layers that predict tokens further ahead (section 2.2) are left out.
"""

from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import Layout, Tensor, fused, linear, norm, table
from instar.models.rotary import Yarn
from instar.models.spec import Experts, Latent, Layer, Mlp, ModelSpec, Norm, Rotary

# Layers, width, heads, width of the MLP of a dense layer (section 4.2).
SIZES: dict[str, tuple[int, int, int, int]] = {"671b": (61, 7168, 128, 18432)}
VARIANTS = {
    "671b": {
        "head_dim": 128,
        "query_rank": 1536,
        "dense_layers": 3,
        "groups": 8,
        "top_groups": 4,
        "scale": 2.5,
    }
}
LATENT_NORM = Norm("rms", 1e-6)


def deepseek_v3(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    value_dim: int | None = None,
    rank: int | None = None,
    query_rank: int | None = None,
    bias: bool = False,
    rotary: Rotary | None = None,
    mlp_width: int | None = None,
    dense_layers: int = 1,
    experts: int = 256,
    experts_per_token: int = 8,
    expert_width: int | None = None,
    shared_experts: int = 1,
    groups: int = 1,
    top_groups: int = 1,
    router_bias: bool = True,
    normalise: bool = True,
    scale: float = 1.0,
    vocab_size: int = 129_280,
    max_positions: int = 4096,
    tied: bool = False,
    norm_epsilon: float = 1e-6,
) -> ModelSpec:
    """A DeepSeek-V3 of any size; see `spec.Latent` and `spec.Experts` for what is not said here.

    The sizes of attention follow from `head_dim` as those of the published models do: half of it
    turns besides, and the rank of the latents is four times as large (DeepSeek-AI 2024, 2405.04434,
    section 2.1.4). The first `dense_layers` have an MLP of `mlp_width`, 8/3 of the width as in a
    LLaMA unless stated; the others have experts, of which those that read a token, with the shared
    ones, are together as wide.
    """
    head_dim = head_dim or width // heads
    rms = Norm("rms", norm_epsilon)
    mixer = Latent(
        heads=heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim or max(2, head_dim // 4 * 2),
        value_dim=value_dim or head_dim,
        rank=rank or 4 * head_dim,
        query_rank=query_rank,
        rotary=rotary or Rotary(style="interleaved"),
        norm=LATENT_NORM,
        bias=bias,
    )
    mlp_width = mlp_width or -(-8 * width // (3 * 64)) * 64
    expert_width = expert_width or max(1, mlp_width // (experts_per_token + shared_experts))
    dense = Mlp(mlp_width, "silu", gated=True)
    sparse = Experts(
        expert=Mlp(expert_width, "silu", gated=True),
        count=experts,
        top_k=experts_per_token,
        score="sigmoid",
        normalise=normalise,
        choice_bias=router_bias,
        scale=scale,
        groups=groups,
        top_groups=top_groups,
        shared=Mlp(shared_experts * expert_width, "silu", gated=True),
    )
    first = min(dense_layers, depth)
    layers = ((first, Layer(mixer, dense, rms)), (depth - first, Layer(mixer, sparse, rms)))
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=tuple((repeat, (layer,)) for repeat, layer in layers if repeat),
        final_norm=rms,
        tied=tied,
    )


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a DeepseekV3ForCausalLM."""
    heads = config.integer("num_attention_heads")
    config.expect(
        num_key_value_heads=heads,
        moe_layer_freq=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        pretraining_tp=1,
    )
    config.choice("hidden_act", llama.ACTIVATIONS, "silu")
    # How many layers that predict further tokens come after the last one: they are left out.
    config.integer("num_nextn_predict_layers", 0, least=0)
    positions = config.integer("max_position_embeddings")
    return deepseek_v3(
        depth=config.integer("num_hidden_layers", most=MOST_LAYERS),
        width=config.integer("hidden_size"),
        heads=heads,
        head_dim=config.integer("qk_nope_head_dim"),
        rotary_dim=config.integer("qk_rope_head_dim"),
        value_dim=config.integer("v_head_dim"),
        rank=config.integer("kv_lora_rank"),
        query_rank=config.integer("q_lora_rank", None),
        bias=config.flag("attention_bias", False),
        rotary=_read_rotary(config, positions),
        mlp_width=config.integer("intermediate_size"),
        dense_layers=config.integer("first_k_dense_replace", least=0),
        experts=config.integer("n_routed_experts"),
        experts_per_token=config.integer("num_experts_per_tok"),
        expert_width=config.integer("moe_intermediate_size"),
        shared_experts=config.integer("n_shared_experts"),
        groups=config.integer("n_group"),
        top_groups=config.integer("topk_group"),
        normalise=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor"),
        vocab_size=config.integer("vocab_size"),
        max_positions=positions,
        tied=config.flag("tie_word_embeddings", False),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
    )


def _read_rotary(config: HubConfig, positions: int) -> Rotary:
    rotary = llama.read_rotary(config, positions)
    if rotary.scaling is not None and not isinstance(rotary.scaling, Yarn):
        raise config.error("rope_scaling", "is of a kind that no DeepSeek-V3 has: only yarn is")
    style = "interleaved" if config.flag("rope_interleave", True) else "half"
    return Rotary(rotary.theta, style=style, scaling=rotary.scaling)


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a DeepseekV3ForCausalLM's config.json."""
    layers = spec.each_layer()
    first, last = layers[0], layers[-1]
    mixer, experts = first.mixer, last.mlp
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, Mlp)]
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.heads,
        "qk_nope_head_dim": mixer.head_dim,
        "qk_rope_head_dim": mixer.rotary_dim,
        "v_head_dim": mixer.value_dim,
        "kv_lora_rank": mixer.rank,
        "q_lora_rank": mixer.query_rank,
        "attention_bias": mixer.bias,
        "rope_interleave": mixer.rotary.style == "interleaved",
        "hidden_act": experts.expert.activation,
        "intermediate_size": dense[0].width if dense else experts.expert.width,
        "first_k_dense_replace": len(dense),
        "moe_layer_freq": 1,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.expert.width,
        "n_shared_experts": experts.shared.width // experts.expert.width,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
        "norm_topk_prob": experts.normalise,
        "routed_scaling_factor": experts.scale,
        "scoring_func": experts.score,
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": first.norm.epsilon,
        "tie_word_embeddings": spec.tied,
        "vocab_size": spec.vocab_size,
    } | llama.write_rotary(mixer.rotary)


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer of either kind."""
    stem = "model.layers.{layer}."
    mlp_tensors = expert_tensors if isinstance(layer.mlp, Experts) else llama.mlp_tensors
    return [
        *norm(f"{stem}input_layernorm", "mixer_norm", layer.norm),
        *latent_tensors(f"{stem}self_attn.", layer.mixer),
        *norm(f"{stem}post_attention_layernorm", "mlp_norm", layer.norm),
        *mlp_tensors(f"{stem}mlp.", "mlp"),
    ]


def latent_tensors(stem: str, mixer: Latent) -> list[Tensor]:
    """Latent attention; the matrices of keys and values are one, head by head."""
    keys_and_values = {
        "mixer.key": "heads head_dim -> heads head_dim",
        "mixer.value": "heads value_dim -> heads value_dim",
    }
    if mixer.query_rank is None:
        query = linear(f"{stem}q_proj", "mixer.query", "embed", "heads query_dim")
    else:
        query = [
            *linear(f"{stem}q_a_proj", "mixer.query_latent", "embed", "query_rank", mixer.bias),
            *norm(f"{stem}q_a_layernorm", "mixer.query_norm", mixer.norm, "query_rank"),
            *linear(f"{stem}q_b_proj", "mixer.query", "query_rank", "heads query_dim"),
        ]
    return [
        *query,
        *linear(f"{stem}kv_a_proj_with_mqa", "mixer.latent", "embed", "latent", mixer.bias),
        *norm(f"{stem}kv_a_layernorm", "mixer.latent_norm", mixer.norm, "rank"),
        *fused(
            f"{stem}kv_b_proj", keys_and_values, False, "heads both -> (heads both)", inputs="rank"
        ),
        *linear(f"{stem}o_proj", "mixer.out", "heads value_dim", "embed", mixer.bias),
    ]


def expert_tensors(stem: str, path: str) -> list[Tensor]:
    """A router with its bias, each expert, and the shared ones as one."""
    return [
        *linear(f"{stem}gate", f"{path}.router", "embed", "experts"),
        table(f"{stem}gate.e_score_correction_bias", f"{path}.choice_bias", "experts"),
        *llama.mlp_tensors(f"{stem}experts.{{expert}}.", path),
        *llama.mlp_tensors(f"{stem}shared_experts.", f"{path}.shared", width="shared"),
    ]


LAYOUT = Layout(
    llama.outer_tensors,
    layer_tensors,
    llama.LAYOUT.ignored,
    llama.LAYOUT.prefix,
    further=("model.layers.{layer}.", "eh_proj.weight"),
)
FAMILY = Family(
    "deepseek_v3",
    deepseek_v3,
    SIZES,
    VARIANTS,
    options=("experts", "experts_per_token", "router_bias"),
    without=("kv_heads", "qk_norm"),
    hub=HubFormat(
        ("deepseek_v3",),
        "DeepseekV3ForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="DeepseekV3ForSequenceClassification",
    ),
)
