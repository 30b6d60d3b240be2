"""What a stage that predicts tokens minimises, against NumPy."""

import types

import jax
import numpy as np
import pytest

from instar.schema import build
from instar.stages.config import LanguageConfig
from instar.stages.language import make_loss

# A model whose parameters are its logits, and no routers.
MODEL = types.SimpleNamespace(
    apply=lambda params, tokens, **rates: (params, {}), head=lambda params: lambda hidden: hidden
)
BALANCE = types.SimpleNamespace(losses=lambda aux, weight: (0.0, {}))


@pytest.mark.parametrize("weights", [{}, {"z_loss": 0.3}, {"max_z_loss": 0.2}])
def test_the_loss_is_its_terms_by_their_weights(weights):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    batch = {
        **dict.fromkeys(("tokens", "positions", "segment_ids"), np.zeros((2, 3), np.int32)),
        "targets": rng.integers(0, 5, (2, 3)),
        "weights": np.asarray([[1, 0, 1], [1, 1, 0]], np.float32),
    }
    given = {"data": {"path": "x", "sequence_length": 3}, "batch": {"size": 2}, "steps": 1}
    loss_sums = make_loss(MODEL, build(given | weights, LanguageConfig), BALANCE)
    found, sums = loss_sums(logits, None, batch, jax.random.key(0))
    log_z = np.log(np.exp(logits).sum(-1))
    nats = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    expected = nats + weights.get("z_loss", 0) * log_z**2
    expected += weights.get("max_z_loss", 0) * logits.max(-1) ** 2
    assert found == pytest.approx((batch["weights"] * expected).sum(), rel=1e-5)
    assert sums["loss"] == pytest.approx((batch["weights"] * nats).sum(), rel=1e-5)
