"""How many parameters a model has and how many FLOP a token costs, from its spec alone.

One convention everywhere, so that figures can be compared: *model* FLOPs in the sense of PaLM
(Chowdhery et al. 2022, appendix B), that is, what the mathematics needs and not what a program
happens to execute, with causal attention counted half:

    forward FLOP for each token = 2 P + 4 * sum over layers of heads * head_dim * keys
    train FLOP for each token   = 3 * forward

P counts the parameters that a token is multiplied with: every matrix of every layer and the head,
tied or not, but no embedding table (a look-up costs nothing), no bias or norm, and of the experts
of a layer those that a token is given to. `keys` is the
mean number of keys that a query sees, S/2 for a sequence of length S. `head_dim` is the mean of the
sizes of a query and of a value, where they differ. The backward pass costs
twice the forward pass. Recomputation of activations, padding of the vocabulary, softmax, norms and
activation functions are not counted, and neither are the shorter segments of packed documents
subtracted.

PaLM's own formula, 6 N + 12 L H Q T, counts every key for every query (`keys` = S): it is larger
by 6 L H Q T, which flatters long sequences.
"""

from dataclasses import dataclass

from instar.models.spec import Attention, Experts, Latent, Layer, Mlp, ModelSpec, Norm

# One multiplication and one addition.
_FLOP_PER_MULTIPLY_ADD = 2
# Gradients with respect to the inputs and to the weights each cost as much as the forward pass.
_TRAIN_PASSES = 3


@dataclass(frozen=True)
class ParameterCount:
    """The parameters of a model.

    Attributes:
      total: all of them; a tied table counts once.
      embedding: the tables of tokens and of learned positions.
      head: the language-model head, 0 where it is tied to the table of tokens; or a scalar head.
      matrices: the matrices of the layers, those of all experts, and those beside a narrow table.
      vectors: biases and the scales of norms.
      matmul: what each token is multiplied with: `matrices`, but only the experts that are chosen
        for it, and the head, tied or not.
    """

    total: int
    embedding: int
    head: int
    matrices: int
    vectors: int
    matmul: int


def parameter_count(spec: ModelSpec) -> ParameterCount:
    """Counts the parameters that `instar.models` makes for a spec."""
    vocabulary = spec.vocab_size * spec.table_width
    positions = spec.learned_positions * (spec.max_positions + spec.position_offset)
    embedding = vocabulary + positions * spec.width
    scalar = spec.output == "scalar"
    head = spec.table_width + 1 if scalar else 0 if spec.tied else vocabulary
    layers = spec.each_layer()
    matrices = sum(_layer_matrices(layer, spec.width) for layer in layers)
    if spec.embedding_width is not None:
        matrices += 2 * spec.width * spec.embedding_width
    idle = sum(_idle_matrices(layer, spec.width) for layer in layers)
    vectors = sum(_norm_vectors(n, spec.width) for n in (spec.embedding_norm, spec.final_norm))
    vectors += sum(_layer_vectors(layer, spec.width) for layer in layers)
    if spec.head_bias and not scalar:
        vectors += spec.vocab_size
    return ParameterCount(
        total=embedding + head + matrices + vectors,
        embedding=embedding,
        head=head,
        matrices=matrices,
        vectors=vectors,
        matmul=matrices - idle + (spec.table_width if scalar else vocabulary),
    )


def visible_keys(sequence_length: int, window: int | None = None) -> float:
    """The mean number of keys that one of `sequence_length` queries sees.

    With a causal mask S/2, the area under the diagonal: the exact mean is (S + 1)/2, and the half
    key is dropped as everybody drops it. A window w <= S cuts a triangle of side S - w off that
    area: (S^2 - (S - w)^2) / 2S = w (1 - w / 2S), against the exact w (1 - (w - 1) / 2S).
    """
    seen = min(window or sequence_length, sequence_length)
    return seen * (1 - seen / (2 * sequence_length))


def forward_flops_per_token(spec: ModelSpec, sequence_length: int) -> float:
    """FLOP of the forward pass for each token of a sequence, the logits included."""
    matrices = _FLOP_PER_MULTIPLY_ADD * parameter_count(spec).matmul
    attention = 0.0
    for repeat, period in spec.layers:
        for layer in period:
            attention += repeat * _multiplied_by_keys(layer.mixer, sequence_length)
    return matrices + _FLOP_PER_MULTIPLY_ADD * attention


def train_flops_per_token(spec: ModelSpec, sequence_length: int) -> float:
    """FLOP of a training step for each token of rows of `sequence_length` tokens."""
    return _TRAIN_PASSES * forward_flops_per_token(spec, sequence_length)


def mfu(flops_per_token: float, tokens_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilisation in [0, 1] (Chowdhery et al. 2022, appendix B).

    Args:
      flops_per_token: `train_flops_per_token` of the model.
      tokens_per_second: of the whole run, all devices together.
      peak_flops: FLOP/s of all devices together.
    """
    return flops_per_token * tokens_per_second / peak_flops


def _multiplied_by_keys(mixer: Attention | Latent, sequence_length: int) -> float:
    """Each key is multiplied twice: with the query, and its value with the weight."""
    if isinstance(mixer, Latent):
        sizes = mixer.query_dim + mixer.value_dim
        return mixer.heads * sizes * visible_keys(sequence_length)
    return 2 * mixer.heads * mixer.head_dim * visible_keys(sequence_length, mixer.window)


def _layer_matrices(layer: Layer, width: int) -> int:
    mlp, attention = layer.mlp, _attention_matrices(layer.mixer, width)
    if isinstance(mlp, Experts):
        router = width * mlp.count
        shared = 0 if mlp.shared is None else _mlp_matrices(mlp.shared, width)
        return attention + router + shared + mlp.count * _mlp_matrices(mlp.expert, width)
    return attention + _mlp_matrices(mlp, width)


def _attention_matrices(mixer: Attention | Latent, width: int) -> int:
    if isinstance(mixer, Latent):
        read = width if mixer.query_rank is None else mixer.query_rank
        to_latents = width * (mixer.cached_dim + (mixer.query_rank or 0))
        from_latents = mixer.rank * (mixer.head_dim + mixer.value_dim) + read * mixer.query_dim
        return to_latents + mixer.heads * (from_latents + mixer.value_dim * width)
    # Queries and the output have all heads; keys and values may have fewer.
    return 2 * width * mixer.head_dim * (mixer.heads + mixer.kv_heads)


def _idle_matrices(layer: Layer, width: int) -> int:
    """The parameters of the experts that are not chosen for a token."""
    mlp = layer.mlp
    if not isinstance(mlp, Experts):
        return 0
    return (mlp.count - mlp.top_k) * _mlp_matrices(mlp.expert, width)


def _mlp_matrices(mlp: Mlp, width: int) -> int:
    return (3 if mlp.gated else 2) * width * mlp.width


def _layer_vectors(layer: Layer, width: int) -> int:
    norms = len(layer.norms) * _norm_vectors(layer.norm, width)
    return norms + _attention_vectors(layer.mixer, width) + _mlp_vectors(layer.mlp, width)


def _attention_vectors(mixer: Attention | Latent, width: int) -> int:
    if isinstance(mixer, Latent):
        biases = mixer.bias * (mixer.cached_dim + (mixer.query_rank or 0) + width)
        ranks = (mixer.rank, mixer.query_rank or 0)
        return biases + sum(_norm_vectors(mixer.norm, rank) for rank in ranks)
    biases = mixer.bias * mixer.head_dim * (mixer.heads + 2 * mixer.kv_heads)
    heads = mixer.heads + mixer.kv_heads if mixer.qk_norm_over == "all" else 2
    norms = heads * _norm_vectors(mixer.qk_norm, mixer.head_dim)
    return biases + mixer.out_bias * width + norms


def _mlp_vectors(mlp: Mlp | Experts, width: int) -> int:
    if isinstance(mlp, Experts):
        shared = 0 if mlp.shared is None else _mlp_vectors(mlp.shared, width)
        return shared + (mlp.count if mlp.choice_bias else 0)
    return mlp.bias * ((2 if mlp.gated else 1) * mlp.width + width)


def _norm_vectors(norm: Norm | None, width: int) -> int:
    return 0 if norm is None else (1 + norm.bias) * width
