"""GPT-J (Wang and Komatsuzaki 2021): attention and MLP side by side behind one norm."""

from typing import Any

from instar.families.family import Family, HubFormat
from instar.families.gpt3 import ACTIVATIONS
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import Layout, Tensor, linear, norm, table
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm, Rotary

# Layers, width, heads.
SIZES: dict[str, tuple[int, int, int]] = {"6b": (28, 4096, 16)}


def gptj(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 50400,
    max_positions: int = 2048,
    tied: bool = False,
    rotary_dim: int | None = None,
    activation: Activation = "gelu_tanh",
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A GPT-J of any size; the first `rotary_dim` elements of a head turn, 64 or all of fewer."""
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    head_dim = head_dim or width // heads
    fraction = (rotary_dim or min(64, head_dim)) / head_dim
    rotary = Rotary(fraction=fraction, style="interleaved")
    mixer = Attention(heads, heads, head_dim, rotary=rotary)
    mlp = Mlp(mlp_width or 4 * width, activation, bias=True)
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (Layer(mixer, mlp, layer_norm, "shared"),)),),
        final_norm=layer_norm,
        tied=tied,
        head_bias=not tied,
    )


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a GPTJForCausalLM."""
    width, heads = config.integer("n_embd"), config.integer("n_head")
    if width % heads:
        raise config.error("n_embd", f"({width}) is not a multiple of n_head ({heads})")
    rotary_dim = config.integer("rotary_dim", 64)
    if rotary_dim > width // heads or rotary_dim % 2:
        raise config.error(
            "rotary_dim", f"({rotary_dim}) must be even and at most {width // heads}"
        )
    config.expect(tie_word_embeddings=False)
    return gptj(
        depth=config.integer("n_layer", most=MOST_LAYERS),
        width=width,
        heads=heads,
        mlp_width=config.integer("n_inner", None),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("n_positions", 2048),
        rotary_dim=rotary_dim,
        activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a GPTJForCausalLM's config.json."""
    layer = spec.each_layer()[0]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "n_embd": spec.width,
        "n_head": layer.mixer.heads,
        "n_layer": spec.depth,
        "n_inner": layer.mlp.width,
        "n_positions": spec.max_positions,
        "rotary_dim": round(layer.mixer.rotary.fraction * layer.mixer.head_dim),
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
        "activation_function": names[layer.mlp.activation],
        "layer_norm_epsilon": layer.norm.epsilon,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    return [
        table("transformer.wte.weight", "embedding", "vocab embed"),
        *norm("transformer.ln_f", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("lm_head", "head", "embed", "vocab", bias=True)),
    ]


def mlp_tensors(layer: Layer, stem: str) -> list[Tensor]:
    """The norm of a layer and its MLP."""
    return [
        *norm(f"{stem}ln_1", "mixer_norm", layer.norm),
        *linear(f"{stem}mlp.fc_in", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}mlp.fc_out", "mlp.down", "mlp", "embed", bias=True),
    ]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "transformer.h.{layer}."
    return [
        *mlp_tensors(layer, stem),
        *linear(f"{stem}attn.q_proj", "mixer.query", "embed", "heads head_dim"),
        *linear(f"{stem}attn.k_proj", "mixer.key", "embed", "kv_heads head_dim"),
        *linear(f"{stem}attn.v_proj", "mixer.value", "embed", "kv_heads head_dim"),
        *linear(f"{stem}attn.out_proj", "mixer.out", "heads head_dim", "embed"),
    ]


MASKS = (r".*\.attn\.(bias|masked_bias|causal_mask)", r".*\.attn\.embed_positions")
FAMILY = Family(
    "gptj",
    gptj,
    SIZES,
    hub=HubFormat(
        ("gptj",),
        "GPTJForCausalLM",
        read_config,
        write_config,
        Layout(outer_tensors, layer_tensors, MASKS, prefix="transformer."),
        scorer="GPTJForSequenceClassification",
    ),
)
