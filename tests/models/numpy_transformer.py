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
    x = x * (spec.offset + params["scale"])
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


def rotate_vector(x: np.ndarray, position: int, rotary, n: int) -> np.ndarray:
    """The first n elements of one head at one position: pairs turn by position * theta^(-2i/n)."""
    y, longer = x.copy(), 1.0
    for i in range(n // 2):
        turn = rotary.theta ** (-2 * i / n)
        if rotary.scaling is not None:
            turn, longer = yarn(i, turn, rotary, n)
        angle = position * (float(np.float16(turn)) if rotary.rounded else turn)
        first, second = (i, i + n // 2) if rotary.style == "half" else (2 * i, 2 * i + 1)
        a, b = x[first], x[second]
        y[first] = longer * (a * math.cos(angle) - b * math.sin(angle))
        y[second] = longer * (a * math.sin(angle) + b * math.cos(angle))
    return y


def yarn(i: int, turn: float, rotary, n: int) -> tuple[float, float]:
    """How far pair i turns (Peng et al. 2023, eq. 23, as coded), and what it is multiplied by."""
    scaling = rotary.scaling

    def pair_of(turns: float) -> float:
        """The j with positions * theta^(-2j/n) / 2 pi = turns."""
        return n / 2 * math.log(scaling.positions / (2 * math.pi * turns), rotary.theta)

    low = max(0, math.floor(pair_of(scaling.fast)))
    high = min(n - 1, math.ceil(pair_of(scaling.slow)))
    slowed = min(1.0, max(0.0, (i - low) / (high - low)))
    longer = yarn_growth(scaling, scaling.mscale) / yarn_growth(scaling, scaling.mscale_all_dim)
    return turn * (1 - slowed) + turn / scaling.factor * slowed, longer


def yarn_growth(scaling, by: float) -> float:
    """0.1 m ln(s) + 1."""
    return 0.1 * by * math.log(scaling.factor) + 1


def rotate_head(x: np.ndarray, place: int, block: int, rotary) -> np.ndarray:
    """One head of a token; with two planes its halves turn by place and by block."""
    n = round(len(x) * rotary.fraction)
    if rotary.planes == 1:
        return rotate_vector(x, place, rotary, n)
    assert n == len(x)
    halves = (x[: n // 2], place), (x[n // 2 :], block)
    return np.concatenate([rotate_vector(half, at, rotary, n // 2) for half, at in halves])


def places_and_blocks(tokens, positions, segments, prefix) -> tuple[np.ndarray, np.ndarray]:
    """Du et al. 2022, section 2.3, for the texts of one row."""
    places, blocks = positions.copy(), positions.copy()
    for text in set(segments):
        here = np.flatnonzero(segments == text)
        backwards = zip(tokens[here[::-1]], positions[here[::-1]], strict=True)
        at = {int(token): int(position) for token, position in backwards}
        start = at.get(prefix.start_id, len(tokens))
        masked = next((at[token] for token in prefix.mask_ids if token in at), 0)
        for i in here:
            blocks[i] = max(positions[i] - start + 1, 0)
            places[i] = masked if positions[i] >= start else positions[i]
    return places, blocks


def alibi_slope(head: int, heads: int) -> float:
    """The slope of head `head` of `heads`, as in the authors' published code."""
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def bfloat16(x: float) -> float:
    """x with eight significant binary digits, halves to even."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(fraction * 256), exponent - 8)


def visible(i: int, j: int, positions: np.ndarray, segments: np.ndarray, window) -> bool:
    """Whether query i sees key j of the same row."""
    if segments[j] == 0 or segments[i] != segments[j]:
        return False
    distance = positions[i] - positions[j]
    return distance >= 0 and (window is None or distance < window)


def attention_row(x: np.ndarray, places, positions, segments: np.ndarray, spec, params: dict):
    """Attention of one row [S, width]; a query that sees nothing gives zeros before `out`."""
    q, k, v = (
        np.einsum("se,ehd->shd", x, params[name]["kernel"])
        + (params[name]["bias"] if spec.bias else 0)
        for name in ("query", "key", "value")
    )
    if spec.qk_norm is not None and spec.qk_norm_over == "head":
        q = norm(q, spec.qk_norm, params["query_norm"])
        k = norm(k, spec.qk_norm, params["key_norm"])
    elif spec.qk_norm is not None:
        q, k = (
            norm(
                a.reshape(len(a), -1),
                spec.qk_norm,
                {part: value.reshape(-1) for part, value in params[name].items()},
            ).reshape(a.shape)
            for a, name in ((q, "query_norm"), (k, "key_norm"))
        )
    if spec.rotary is not None:
        q, k = (
            np.array(
                [
                    [rotate_head(head, place, block, spec.rotary) for head in row]
                    for row, place, block in zip(a, places, positions, strict=True)
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
            if spec.alibi_rounded:
                # Falcon's code: (q.k + the bias of key j) / sqrt(d), the bias a bfloat16.
                slope = bfloat16(alibi_slope(h, spec.heads))
                biases = [bfloat16(slope * bfloat16(positions[j])) for j in seen]
                logits = logits + scale * np.array(biases)
            elif spec.alibi:
                distances = np.array([positions[i] - positions[j] for j in seen])
                logits = logits - alibi_slope(h, spec.heads) * distances
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            mixed[i, h] = sum(w * v[j, shared] for w, j in zip(weights, seen, strict=True))
    out = np.einsum("shd,hde->se", mixed, params["out"]["kernel"])
    return out + params["out"]["bias"] if spec.out_bias else out


def latent_row(x: np.ndarray, positions, segments: np.ndarray, spec, params: dict):
    """Latent attention of one row [S, width]: DeepSeek-AI 2024, 2412.19437, eq. 1 to 11."""

    def affine(name: str, x: np.ndarray, bias: bool) -> np.ndarray:
        return x @ params[name]["kernel"] + (params[name]["bias"] if bias else 0)

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        return rotate_vector(x, position, spec.rotary, spec.rotary_dim)

    read = x
    if spec.query_rank is not None:
        read = norm(affine("query_latent", x, spec.bias), spec.norm, params["query_norm"])
    down = affine("latent", x, spec.bias)
    c = norm(down[:, : spec.rank], spec.norm, params["latent_norm"])
    scale = (spec.head_dim + spec.rotary_dim) ** -0.5
    if spec.rotary.scaling is not None:
        scale *= yarn_growth(spec.rotary.scaling, spec.rotary.scaling.mscale_all_dim) ** 2
    out = np.zeros(x.shape) + (params["out"]["bias"] if spec.bias else 0)
    for h in range(spec.heads):
        q, k, v = (
            rows @ params[name]["kernel"][:, h]
            for rows, name in ((read, "query"), (c, "key"), (c, "value"))
        )
        for i in range(len(x)):
            seen = [j for j in range(len(x)) if visible(i, j, positions, segments, None)]
            if not seen:
                continue
            own, shared = q[i, : spec.head_dim], turned(q[i, spec.head_dim :], positions[i])
            logits = np.array(
                [own @ k[j] + shared @ turned(down[j, spec.rank :], positions[j]) for j in seen]
            )
            weights = np.exp(scale * (logits - logits.max()))
            out[i] += weights / weights.sum() @ v[seen] @ params["out"]["kernel"][h]
    return out


def mlp(x: np.ndarray, spec, params: dict) -> np.ndarray:
    """down(act(up x)), or down(act(gate x) * up x)."""

    def affine(name: str, x: np.ndarray) -> np.ndarray:
        return x @ params[name]["kernel"] + (params[name]["bias"] if spec.bias else 0)

    if spec.gated:
        return affine("down", activate(affine("gate", x), spec.activation) * affine("up", x))
    return affine("down", activate(affine("up", x), spec.activation))


def experts(x: np.ndarray, real: np.ndarray, spec, params: dict) -> np.ndarray:
    """For each real token the outputs of the chosen experts, weighted; and of the shared one."""
    out = np.zeros(x.shape)
    for token in np.flatnonzero(real):
        logits = x[token] @ params["router"]["kernel"]
        if spec.score == "softmax":
            scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        else:
            scores = 1 / (1 + np.exp(-logits))
        preferred = scores + params["choice_bias"] if spec.choice_bias else scores
        size = spec.count // spec.groups
        groups = [range(g * size, (g + 1) * size) for g in range(spec.groups)]
        groups.sort(key=lambda group: -sum(sorted(preferred[group])[-2:]))
        possible = [e for group in groups[: spec.top_groups] for e in group]
        chosen = sorted(possible, key=lambda e: (-preferred[e], e))[: spec.top_k]
        whole = scores[chosen].sum() if spec.normalise else 1.0
        for e in chosen:
            matrices = {n: slice_layer(params[n], e) for n in ("up", "gate", "down") if n in params}
            weight = spec.scale * scores[e] / whole
            out[token] += weight * mlp(x[token], spec.expert, matrices)
        if spec.shared is not None:
            out[token] += mlp(x[token], spec.shared, params["shared"])
    return out


def slice_layer(params, index: int):
    """The parameters of one of the stacked layers."""
    if isinstance(params, dict):
        return {name: slice_layer(value, index) for name, value in params.items()}
    return params[index]


def layer_row(x: np.ndarray, places, positions, segments: np.ndarray, layer, p: dict):
    """A layer of one row, each arrangement as its paper writes it."""

    def n(name: str, x: np.ndarray) -> np.ndarray:
        return norm(x, layer.norm, p[name])

    def mix(x: np.ndarray) -> np.ndarray:
        if hasattr(layer.mixer, "rank"):
            return latent_row(x, positions, segments, layer.mixer, p["mixer"])
        return attention_row(x, places, positions, segments, layer.mixer, p["mixer"])

    def feed(x: np.ndarray) -> np.ndarray:
        if hasattr(layer.mlp, "expert"):
            return experts(x, segments > 0, layer.mlp, p["mlp"])
        return mlp(x, layer.mlp, p["mlp"])

    if layer.arrangement == "pre_norm":
        x = x + mix(n("mixer_norm", x))
        return x + feed(n("mlp_norm", x))
    if layer.arrangement == "post_norm":
        x = n("mixer_sum_norm", x + mix(x))
        return n("mlp_sum_norm", x + feed(x))
    if layer.arrangement == "output_norm":
        x = x + n("mixer_out_norm", mix(x))
        return x + n("mlp_out_norm", feed(x))
    if layer.arrangement == "sandwich":
        x = x + n("mixer_out_norm", mix(n("mixer_norm", x)))
        return x + n("mlp_out_norm", feed(n("mlp_norm", x)))
    if layer.arrangement == "parallel":
        return x + mix(n("mixer_norm", x)) + feed(n("mlp_norm", x))
    if layer.arrangement == "shared":
        return x + mix(n("mixer_norm", x)) + feed(n("mixer_norm", x))
    assert layer.arrangement == "normed"
    h = n("mixer_norm", x)
    h = n("mlp_norm", layer.residual_scale * h + mix(h))
    return layer.residual_scale * h + feed(h)


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
        places = row_positions
        if spec.prefix is not None:
            places, row_positions = places_and_blocks(
                row_tokens, row_positions, row_segments, spec.prefix
            )
        x = spec.embedding_scale * params["embedding"][row_tokens]
        if spec.embedding_width is not None:
            x = x @ params["widen"]["kernel"]
        if spec.learned_positions:
            x = x + params["position_embedding"][places + spec.position_offset]
        if spec.embedding_norm is not None:
            x = norm(x, spec.embedding_norm, params["embedding_norm"])
        for group, (repeat, period) in enumerate(spec.layers):
            for index in range(repeat):
                for place, layer in enumerate(period):
                    p = slice_layer(params[f"group_{group}"][f"layer_{place}"], index)
                    x = layer_row(x, places, row_positions, row_segments, layer, p)
        if spec.final_norm is not None:
            x = norm(x, spec.final_norm, params["final_norm"])
        if spec.embedding_width is not None:
            x = x @ params["narrow"]["kernel"]
        rows.append(head(x, spec, params))
    return np.array(rows)


def head(x: np.ndarray, spec, params: dict) -> np.ndarray:
    """The logits [S, vocab] of hidden states."""
    table = params["embedding"].T if spec.tied else params["head"]["kernel"]
    if spec.head_normed:
        table = table / np.sqrt((table**2).sum(0))
    found = x @ table + (params["head"]["bias"] if spec.head_bias else 0)
    cap = spec.logit_softcap
    return found if cap is None else cap * np.tanh(found / cap)
