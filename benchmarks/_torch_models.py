"""The GPT and the LLaMA of the benchmarks in PyTorch, as its users write them.

One matrix product for queries, keys and values (and one for gate and up), PyTorch's own attention,
norms and activations, rotary tables made once. The state dicts are filled from Instar's parameters
by `load_instar`, so that both frameworks start from the same point and their losses can be
compared.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model; `family` is gpt3 or llama."""

    family: str
    depth: int
    width: int
    heads: int
    mlp_width: int
    vocab_size: int
    sequence_length: int


class Rotary(nn.Module):
    """Tables of cosines and sines for x [B, heads, S, D], rotating element i with i + D/2."""

    def __init__(self, head_dim: int, length: int, theta: float = 10_000.0):
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1)
        return x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape, bias: bool):
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=bias)
        self.out = nn.Linear(shape.width, shape.width, bias=bias)
        self.rotary = None
        if shape.family == "llama":
            self.rotary = Rotary(shape.width // shape.heads, shape.sequence_length)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class GeluMlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.up = nn.Linear(shape.width, shape.mlp_width)
        self.down = nn.Linear(shape.mlp_width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGluMlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up = nn.Linear(shape.width, 2 * shape.mlp_width, bias=False)
        self.down = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def make_norm(shape: Shape) -> nn.Module:
    if shape.family == "gpt3":
        return nn.LayerNorm(shape.width, eps=1e-5)
    return nn.RMSNorm(shape.width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        gpt = shape.family == "gpt3"
        self.mixer_norm, self.mlp_norm = make_norm(shape), make_norm(shape)
        self.mixer = Attention(shape, bias=gpt)
        self.mlp = GeluMlp(shape) if gpt else SwiGluMlp(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """int64 tokens and targets [B, S] -> the mean loss; embeddings and head are tied."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.position_embedding = None
        if shape.family == "gpt3":
            self.position_embedding = nn.Embedding(shape.sequence_length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.final_norm = make_norm(shape)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def load_instar(model: Transformer, params: Mapping[str, np.ndarray]) -> None:
    """Copies Instar's parameters, named by their paths ("group_0/layer_0/mlp/up/kernel")."""
    prefix = "group_0/layer_0"

    def linear(*paths: str, inputs: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """Weights [depth, out, in] and biases [depth, out] of projections laid side by side."""
        kernels, biases = [], []
        for path in paths:
            kernel = params[f"{prefix}/{path}/kernel"]
            rows = int(np.prod(kernel.shape[1 : 1 + inputs]))
            kernels.append(kernel.reshape(len(kernel), rows, -1).transpose(0, 2, 1))
            if f"{prefix}/{path}/bias" in params:
                biases.append(params[f"{prefix}/{path}/bias"].reshape(len(kernel), -1))
        return np.concatenate(kernels, 1), np.concatenate(biases, 1) if biases else None

    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor(params["embedding"]))
        if model.position_embedding is not None:
            model.position_embedding.weight.copy_(torch.tensor(params["position_embedding"]))
        mlp = {"down": linear("mlp/down")}
        if hasattr(model.blocks[0].mlp, "gate_up"):
            mlp["gate_up"] = linear("mlp/gate", "mlp/up")
        else:
            mlp["up"] = linear("mlp/up")
        qkv = linear("mixer/query", "mixer/key", "mixer/value")
        out = linear("mixer/out", inputs=2)
        for i, block in enumerate(model.blocks):
            modules = [(block.mixer.qkv, qkv), (block.mixer.out, out)]
            modules += [(getattr(block.mlp, name), value) for name, value in mlp.items()]
            for module, (weights, biases) in modules:
                module.weight.copy_(torch.tensor(weights[i]))
                if biases is not None:
                    module.bias.copy_(torch.tensor(biases[i]))
