"""LLaMA (Touvron et al. 2023, section 2.2): RMSNorm, rotary positions, SwiGLU, no biases."""

from instar.models.spec import Attention, Layer, Mlp, ModelSpec, Norm, Rotary

# Layers, width, heads, width of the MLP.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "7b": (32, 4096, 32, 11008),
    "13b": (40, 5120, 40, 13824),
    "33b": (60, 6656, 52, 17920),
    "65b": (80, 8192, 64, 22016),
}


def llama(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 32000,
    max_positions: int = 2048,
    tied: bool = False,
    qk_norm: bool = False,
    rope_theta: float = 10_000.0,
    norm_epsilon: float = 1e-6,
) -> ModelSpec:
    """A LLaMA of any size; the MLP is 8/3 as wide as the model, rounded up to 64, unless stated."""
    norm = Norm("rms", norm_epsilon)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        rotary=Rotary(theta=rope_theta),
        qk_norm=norm if qk_norm else None,
    )
    mlp = Mlp(mlp_width or -(-8 * width // (3 * 64)) * 64, "silu", gated=True)
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (Layer(mixer, mlp, norm),)),),
        final_norm=norm,
        tied=tied,
    )
