"""What a config of PPO may not say, and what follows from one."""

import jax
import pytest

from instar.errors import UserError
from instar.families import llama
from instar.models.language_model import LanguageModel
from instar.reinforcement.experience import Networks
from instar.schema import build
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.stages.ppo import check_pretraining_rows, flops_per_token
from instar.stages.ppo_config import PpoConfig

SETTINGS = {
    "parent": "sft",
    "reward": {"model": "reward"},
    "prompts": {"path": "prompts.jsonl"},
    "batch": {"size": 64},
    "steps": 8,
}


def ptx(rows: int, length: int) -> dict:
    data = {"path": "data", "sequence_length": length}
    return {"ptx": {"data": data, "rows": rows}, "execution": {"loss_chunk": 32}}


def critic(section: str, **changes: float) -> dict:
    return {"critic": {section: changes}}


def adaptive(horizon: float, **changes: float) -> dict:
    return {"update": {"adaptive_kl": {"horizon": horizon}} | changes}


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        (adaptive(13.0), adaptive(12.8), r"horizon \(12.8\) is in responses .* \(12.8\)"),
        ({}, {"reward": {}}, "reward needs either"),
        (
            {"reward": {"scorer": {"function": "a:b"}, "model": None}},
            {"reward": {"scorer": {"function": "a:b"}, "model": "reward"}},
            r"has both .* \(--config.reward.scorer=None, or --config.reward.model=None\)",
        ),
        (adaptive(1e4), adaptive(1e4, beta=0.0), "0 would stay 0: set update.beta"),
        (ptx(4, 64), ptx(4, 48), r"loss_chunk \(32\) must divide ptx.data.sequence_length \(48\)"),
        (
            critic("optimizer", learning_rate=1.0),
            critic("optimizer", learning_rate=0.0),
            "^critic.optimizer.learning_rate must be positive",
        ),
        (
            critic("schedule", decay_steps=5, warmup_steps=4),
            critic("schedule", decay_steps=4, warmup_steps=4),
            r"^critic.schedule.decay_steps \(4\) must be greater than critic.schedule.warmup_steps",
        ),
        (
            critic("schedule", kind="linear", warmup_steps=7),
            critic("schedule", kind="linear", warmup_steps=8),
            r"^critic.schedule.warmup_steps \(8\) must be smaller than steps \(8\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(right, wrong, sentence):
    build(SETTINGS | right, PpoConfig)
    with pytest.raises(UserError, match=sentence):
        build(SETTINGS | wrong, PpoConfig)


def test_the_rows_of_pretraining_text_divide_over_microbatches_and_mesh():
    """An update has two microbatches, and each lies on four devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    half = {"batch": {"size": 64, "microbatch": 32}}
    check_pretraining_rows(build(SETTINGS | half | ptx(8, 64), PpoConfig), mesh)
    check_pretraining_rows(build(SETTINGS | half, PpoConfig), mesh)
    with pytest.raises(UserError, match=r"ptx.rows \(4\) .* make ptx.rows a multiple of 8"):
        check_pretraining_rows(build(SETTINGS | half | ptx(4, 64), PpoConfig), mesh)


def test_the_cost_of_an_iteration_counts_its_pretraining_text():
    """Its gradient is three passes of the policy, at 2 FLOP for each parameter of a matrix."""
    spec = llama.llama(depth=1, width=64, heads=1, mlp_width=64, vocab_size=640, max_positions=256)
    model, lengths = LanguageModel(spec), {"max_length": 32, "path": "prompts.jsonl"}
    sizes = {"prompts": lengths, "response": {"max_new_tokens": 32}, "batch": {"size": 64}}
    without, added = (
        build(SETTINGS | sizes | {"update": {"minibatch": 16, "epochs": 3}} | more, PpoConfig)
        for more in ({}, ptx(8, 128))
    )
    networks = Networks(model, model, model)
    iteration_tokens, row_tokens = 64 * (32 + 32), 3 * (64 // 16) * 8 * 128
    found = [flops_per_token(config, networks) * iteration_tokens for config in (without, added)]
    matrices = 4 * 64 * 64 + 3 * 64 * 64 + 64 * 640
    attention = 2 * 64 * 64  # 64 keys, in the mean, are multiplied twice
    assert found[1] - found[0] == pytest.approx(3 * row_tokens * (2 * matrices + 2 * attention))
