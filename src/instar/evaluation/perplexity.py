"""How well a language model predicts held-out text."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from instar.models.language_model import LanguageModel, Params
from instar.objectives.language import next_token_sums

EvaluationStep = Callable[[Params, dict, dict], dict]


def make_evaluation_step(model: LanguageModel, chunk: int = 0) -> EvaluationStep:
    """The compiled function (params, batch, totals) -> totals, with the batch's sums added."""

    @jax.jit
    def add(params: Params, batch: dict, totals: dict) -> dict:
        hidden, _ = model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
        )
        sums = next_token_sums(
            hidden, model.head(params), batch["targets"], batch["weights"], chunk
        )
        return {name: totals[name] + sums[name] for name in totals}

    return add


def evaluate(
    step: EvaluationStep, params: Params, batches: Iterable[dict], tokens_per_byte: float
) -> dict[str, float]:
    """Held-out loss, perplexity and bits per byte.

    Args:
      batches: dicts of arrays on the mesh, all of one shape.
      tokens_per_byte: predicted tokens for each byte of the held-out text. Each document's end is
        among the tokens, so that the bits are the length of a code that can be decoded.

    Returns:
      `loss` in nats a token, `perplexity`, and `bits_per_byte` = loss / ln 2 * tokens_per_byte.
    """
    totals = {"nats": jnp.zeros(()), "weight": jnp.zeros(())}
    for batch in batches:
        totals = step(params, batch, totals)
    loss = float(totals["nats"]) / max(float(totals["weight"]), 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }
