"""What a config of PPO may not say."""

import pytest

from instar.errors import UserError
from instar.schema import build
from instar.stages.ppo_config import PpoConfig

SETTINGS = {
    "parent": "sft",
    "reward": {"model": "reward"},
    "prompts": {"path": "prompts.jsonl"},
    "batch": {"size": 64},
    "steps": 8,
}


def adaptive(horizon: float, **changes: float) -> dict:
    return {"update": {"adaptive_kl": {"horizon": horizon}} | changes}


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        (adaptive(13.0), adaptive(12.8), r"horizon \(12.8\) is in responses .* \(12.8\)"),
        (adaptive(1e4), adaptive(1e4, beta=0.0), "0 would stay 0: set update.beta"),
    ],
)
def test_what_cannot_be_is_refused(right, wrong, sentence):
    build(SETTINGS | right, PpoConfig)
    with pytest.raises(UserError, match=sentence):
        build(SETTINGS | wrong, PpoConfig)
