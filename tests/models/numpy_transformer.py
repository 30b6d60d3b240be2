"""A decoder-only Transformer in NumPy and float64, written from the papers and not from Instar.

It reads a spec's values and a tree of arrays, and loops over rows, heads and positions, so that
each line can be held against an equation. Only its agreement with the real one counts.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def norm(x: np.ndarray, spec, params: dict) -> np.ndarray:
    """LayerNorm, (x - mean) / sqrt(variance + eps) * g + b, or RMSNorm without mean and b."""
    if spec.kind == "layer":
        x = (x - np.mean(x, -1, keepdims=True)) / np.sqrt(
            np.var(x, -1, keepdims=True) + spec.epsilon
        )
    else:
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + spec.epsilon)
    x = x * params["scale"]
    return x + params["bias"] if spec.bias else x


def activate(x: np.ndarray, name: str) -> np.ndarray:
    """The four activations, from their definitions."""
    if name == "gelu":
        return x * 0.5 * (1 + erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name == "relu"
    return np.where(x > 0, x, 0.0)


def rotate_vector(x: np.ndarray, position: int, rotary) -> np.ndarray:
    """One head at one position: pairs (a, b) turn by position * theta^(-2i/n)."""
    n = round(len(x) * rotary.fraction)
    y = x.copy()
    for i in range(n // 2):
        angle = position * rotary.theta ** (-2 * i / n)
        first, second = (i, i + n // 2) if rotary.style == "half" else (2 * i, 2 * i + 1)
        a, b = x[first], x[second]
        y[first] = a * math.cos(angle) - b * math.sin(angle)
        y[second] = a * math.sin(angle) + b * math.cos(angle)
    return y


def alibi_slope(head: int, heads: int) -> float:
    """The slope of head `head` of `heads`, as in the authors' published code."""
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def visible(i: int, j: int, positions: np.ndarray, segments: np.ndarray, window) -> bool:
    """Whether query i sees key j of the same row."""
    if segments[j] == 0 or segments[i] != segments[j]:
        return False
    distance = positions[i] - positions[j]
    return distance >= 0 and (window is None or distance < window)


def attention_row(x: np.ndarray, positions: np.ndarray, segments: np.ndarray, spec, params: dict):
    """Attention of one row [S, width]; a query that sees nothing gives zeros before `out`."""
    q, k, v = (
        np.einsum("se,ehd->shd", x, params[name]["kernel"])
        + (params[name]["bias"] if spec.bias else 0)
        for name in ("query", "key", "value")
    )
    if spec.qk_norm is not None:
        q = norm(q, spec.qk_norm, params["query_norm"])
        k = norm(k, spec.qk_norm, params["key_norm"])
    if spec.rotary is not None:
        q, k = (
            np.array(
                [
                    [rotate_vector(head, p, spec.rotary) for head in row]
                    for row, p in zip(a, positions, strict=True)
                ]
            )
            for a in (q, k)
        )
    scale = 1 / math.sqrt(spec.head_dim) if spec.scale is None else spec.scale
    mixed = np.zeros(q.shape)
    for h in range(spec.heads):
        shared = h // (spec.heads // spec.kv_heads)
        for i in range(len(x)):
            seen = [j for j in range(len(x)) if visible(i, j, positions, segments, spec.window)]
            if not seen:
                continue
            logits = np.array([q[i, h] @ k[j, shared] * scale for j in seen])
            if spec.softcap is not None:
                logits = spec.softcap * np.tanh(logits / spec.softcap)
            if spec.alibi:
                distances = np.array([positions[i] - positions[j] for j in seen])
                logits = logits - alibi_slope(h, spec.heads) * distances
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            mixed[i, h] = sum(w * v[j, shared] for w, j in zip(weights, seen, strict=True))
    out = np.einsum("shd,hde->se", mixed, params["out"]["kernel"])
    return out + params["out"]["bias"] if spec.out_bias else out


def mlp(x: np.ndarray, spec, params: dict) -> np.ndarray:
    """down(act(up x)), or down(act(gate x) * up x)."""

    def affine(name: str, x: np.ndarray) -> np.ndarray:
        return x @ params[name]["kernel"] + (params[name]["bias"] if spec.bias else 0)

    if spec.gated:
        return affine("down", activate(affine("gate", x), spec.activation) * affine("up", x))
    return affine("down", activate(affine("up", x), spec.activation))


def experts(x: np.ndarray, real: np.ndarray, spec, params: dict) -> np.ndarray:
    """For each real token the outputs of the chosen experts, weighted; 0 for the others."""
    out = np.zeros(x.shape)
    for token in np.flatnonzero(real):
        logits = x[token] @ params["router"]["kernel"]
        if spec.score == "softmax":
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        preferred = scores + params["choice_bias"] if spec.choice_bias else scores
        chosen = sorted(range(spec.count), key=lambda e: (-preferred[e], e))[: spec.top_k]
        whole = scores[chosen].sum() if spec.normalise else 1.0
        for e in chosen:
            matrices = {n: slice_layer(params[n], e) for n in ("up", "gate", "down") if n in params}
            out[token] += scores[e] / whole * mlp(x[token], spec.expert, matrices)
    return out


def slice_layer(params, index: int):
    """The parameters of one of the stacked layers."""
    if isinstance(params, dict):
        return {name: slice_layer(value, index) for name, value in params.items()}
    return params[index]


def logits(spec, params, tokens, positions=None, segments=None) -> np.ndarray:
    """float64 [B, S, vocab]; what it says at padding is not defined."""

    def widen(node):
        if isinstance(node, dict):
            return {name: widen(value) for name, value in node.items()}
        return np.asarray(node, np.float64)

    params = widen(params)
    if positions is None:
        positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    if segments is None:
        segments = np.ones(tokens.shape, int)
    rows = []
    for row_tokens, row_positions, row_segments in zip(tokens, positions, segments, strict=True):
        x = params["embedding"][row_tokens]
        if spec.learned_positions:
            x = x + params["position_embedding"][row_positions]
        for group, (repeat, period) in enumerate(spec.layers):
            for n in range(repeat):
                for place, layer in enumerate(period):
                    p = slice_layer(params[f"group_{group}"][f"layer_{place}"], n)
                    normed = norm(x, layer.norm, p["mixer_norm"])
                    x = x + attention_row(
                        normed, row_positions, row_segments, layer.mixer, p["mixer"]
                    )
                    normed = norm(x, layer.norm, p["mlp_norm"])
                    if hasattr(layer.mlp, "expert"):
                        x = x + experts(normed, row_segments > 0, layer.mlp, p["mlp"])
                    else:
                        x = x + mlp(normed, layer.mlp, p["mlp"])
        if spec.final_norm is not None:
            x = norm(x, spec.final_norm, params["final_norm"])
        rows.append(x @ (params["embedding"].T if spec.tied else params["head"]["kernel"]))
    return np.array(rows)
