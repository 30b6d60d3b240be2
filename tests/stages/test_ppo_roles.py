"""Who may take part in PPO: what the models of the roles have to have in common."""

import jax
import pytest
from interchange_examples import tokenizer

from instar.data.chat import ChatTemplate
from instar.errors import UserError
from instar.families import llama
from instar.interchange.card import ModelCard
from instar.interchange.loading import Opened
from instar.interchange.reward import encoder_of
from instar.reinforcement.experience import Networks
from instar.schema import build
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.stages.ppo_config import PpoConfig
from instar.stages.ppo_roles import Roles, make_card, make_networks


def opened(template: str | None, members: int | None, max_positions: int = 32) -> Opened:
    """A model whose parameters are nowhere."""
    spec = llama.llama(
        depth=1, width=8, heads=2, mlp_width=8, vocab_size=340, max_positions=max_positions
    )
    source = template and ChatTemplate.named(template).source
    card = ModelCard(spec, tokenizer(), source, members=members)
    return Opened(card, {"stage": "sft"}, lambda *_: pytest.fail("nothing is to be read"))


def networks_of(
    *,
    parent: str = "plain",
    reward: Opened | None = None,
    critic: Opened | None = None,
    base: Opened | None = None,
) -> Networks:
    """Those of a run on these models, whose prompts and responses are 16 tokens long."""
    settings = {
        "parent": "sft",
        "reward": {"model": "judge"} if reward else {"scorer": {"function": "module:scorer"}},
        "critic": {"parent": critic and "judge"},
        "base": base and "judge",
        "prompts": {"path": "prompts.jsonl", "max_length": 8},
        "response": {"max_new_tokens": 8},
        "batch": {"size": 64},
        "steps": 1,
    }
    config = build(settings, PpoConfig)
    roles = Roles(opened(parent, None), reward, critic, base)
    card = make_card(config, roles.parent)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return make_networks(config, roles, card, encoder_of(card), mesh)


@pytest.mark.parametrize(
    ("role", "name"), [("reward", "reward.model"), ("critic", "critic.parent")]
)
def test_a_judge_of_another_chat_template_is_refused(role, name):
    judge = opened("chatml", 1)
    with pytest.raises(UserError, match=f"^{name} was trained with another chat template than"):
        networks_of(**{role: judge})
    # Of the policy's own it passes; so does a base, which reads texts as they are.
    found = networks_of(parent="chatml", base=opened(None, None), **{role: judge})
    assert found.base is not None
    networks_of(base=opened("chatml", None))


@pytest.mark.parametrize(
    ("role", "name", "members"),
    [("reward", "reward.model", 1), ("critic", "critic.parent", 1), ("base", "base", None)],
)
def test_a_model_of_too_few_positions_is_refused(role, name, members):
    networks_of(**{role: opened("plain", members, 16)})
    with pytest.raises(UserError, match=f"exceed the 15 positions of {name} judge: lower"):
        networks_of(**{role: opened("plain", members, 15)})
