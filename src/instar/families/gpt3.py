"""GPT-3 (Brown et al. 2020, table 2.1): learned positions, LayerNorm, GELU, biases, tied."""

from instar.models.spec import Attention, Layer, Mlp, ModelSpec, Norm

# Layers, width, heads. The paper prints 24 heads of 128 for 1.3B and a width of 5140 for 13B, which
# contradict its own FLOP column (table D.1): 16 heads and 5120 agree with it.
SIZES: dict[str, tuple[int, int, int]] = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 16),
    "1.3b": (24, 2048, 16),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "175b": (96, 12288, 96),
}


def gpt3(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 50257,
    max_positions: int = 2048,
    tied: bool = True,
    qk_norm: bool = False,
) -> ModelSpec:
    """A GPT-3 of any size; the MLP is four times as wide as the model unless stated."""
    norm = Norm("layer", 1e-5, bias=True)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        bias=True,
        out_bias=True,
        qk_norm=norm if qk_norm else None,
    )
    mlp = Mlp(mlp_width or 4 * width, "gelu_tanh", bias=True)
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (Layer(mixer, mlp, norm),)),),
        final_norm=norm,
        learned_positions=True,
        tied=tied,
    )
