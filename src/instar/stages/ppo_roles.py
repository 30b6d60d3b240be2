"""Who takes part in PPO: the models of the roles, opened, checked against one another, read."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from instar.data.completions import CompletionEncoder
from instar.errors import UserError
from instar.interchange.card import ModelCard
from instar.interchange.loading import Opened
from instar.interchange.parents import pin
from instar.interchange.reward import encoder_of, template_source
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.reinforcement.experience import Networks
from instar.reinforcement.roles import (
    TRAINED,
    footprint,
    frozen_dtype,
    generation_footprint,
    in_dtype,
    memory_table,
    role_shardings,
)
from instar.sharding import rules
from instar.stages.ppo_config import PpoConfig
from instar.stages.ppo_iteration import Frozen
from instar.stages.prefix import check_template
from instar.stages.run import check_attention, make_execution
from instar.training.state import TrainState

# What may be improved: language models, those of an earlier PPO among them.
PARENTS = ("pretrain", "import", "sft", "ppo")


@dataclass(frozen=True)
class Roles:
    """The models that a run is made of, whose parameters are not read yet."""

    parent: Opened
    reward: Opened | None
    critic: Opened | None
    base: Opened | None


def places(config: PpoConfig) -> dict[str, tuple[str, str | None]]:
    """By role, the field that names its model, and the path there."""
    return {
        "parent": ("parent", config.parent),
        "reward": ("reward.model", config.reward.model),
        "critic": ("critic.parent", config.critic.parent),
        "base": ("base", config.base),
    }


def open_roles(config: PpoConfig, folder: epath.Path) -> Roles:
    """Opens them. Raises UserError where one is missing or of the wrong kind."""
    roles = Roles(
        **{
            role: None if path is None else pin(folder, role, path, field=field)
            for role, (field, path) in places(config).items()
        }
    )
    stage = roles.parent.lineage["stage"]
    if stage not in PARENTS:
        raise UserError(
            f"parent {config.parent} comes from stage {stage}, and ppo goes on from "
            f"{', '.join(PARENTS)}"
        )
    for name, opened in (("reward.model", roles.reward), ("critic.parent", roles.critic)):
        if opened is not None and opened.card.members is None:
            raise UserError(f"{name} is a language model: name one that `instar reward` trained")
    for name, opened in (("parent", roles.parent), ("base", roles.base)):
        if opened is not None and opened.card.members is not None:
            raise UserError(f"{name} is a reward model, and must be a language model")
    return roles


def make_card(config: PpoConfig, parent: Opened) -> ModelCard:
    """What the policy is: its parent, and all the tokens at which it stops."""
    source = template_source(parent.card, config.chat_template, config.parent)
    card = dataclasses.replace(parent.card, chat_template=source)
    return card.stopping_at(encoder_of(card).stop_ids)


def make_networks(
    config: PpoConfig, roles: Roles, card: ModelCard, encoder: CompletionEncoder, mesh: Mesh
) -> Networks:
    """What each role computes, checked against tokens, chat template, positions and mesh.

    Raises:
      UserError: a model reads other tokens than the policy, or judges texts of another chat
        template, has too few positions for a prompt with its response, or does not fit the mesh.
    """
    execution = make_execution(config, mesh)
    policy = LanguageModel(card.spec, execution)
    reward = base = None
    if roles.reward is not None:
        reward = RewardModel(roles.reward.card.spec, roles.reward.card.members, execution)
    if roles.base is not None:
        base = LanguageModel(roles.base.card.spec, execution)
    start = roles.critic or roles.reward
    critic = RewardModel(card.spec if start is None else start.card.spec, 1, execution).model
    for role, opened in vars(roles).items():
        if opened is None:
            continue
        name, tokenizer = places(config)[role][0], opened.card.tokenizer
        check_template(opened.card.spec, encoder.tokenizer, encoder.template, name)
        if tokenizer is not None and tokenizer.digest != encoder.tokenizer.digest:
            raise UserError(
                f"{name} reads the tokens of another tokenizer ({tokenizer.digest[:12]}) than "
                f"parent {config.parent} ({encoder.tokenizer.digest[:12]})"
            )
        judges = opened.card.members is not None and opened.card.chat_template is not None
        if judges and tokenizer is not None and encoder_of(opened.card).digest != encoder.digest:
            raise UserError(
                f"{name} was trained with another chat template than parent {config.parent}: "
                "train it with that one, or choose another"
            )
    length = config.prompts.max_length + config.response.max_new_tokens
    models = {"parent": policy, "reward": reward, "critic": critic, "base": base}
    for role, model in models.items():
        if model is None:
            continue
        if length > model.spec.max_positions:
            name, path = places(config)[role]
            raise UserError(
                f"prompts.max_length + response.max_new_tokens ({length}) exceed the "
                f"{model.spec.max_positions} positions of {name} {path}: lower one of the two, or "
                "name a model with more"
            )
        rules.check_divisible(mesh, model.axes, model.shapes)
        language_model = model.model if isinstance(model, RewardModel) else model
        check_attention(language_model, mesh, length)
    return Networks(policy=policy, critic=critic, reference=policy, reward=reward, base=base)


def read_frozen(config: PpoConfig, roles: Roles, networks: Networks, mesh: Mesh) -> Frozen:
    """The parameters of the frozen roles, each in its dtype and in its place."""
    parts = {
        "reference": (roles.parent, networks.reference),
        "reward": (roles.reward, networks.reward),
        "base": (roles.base, networks.base),
    }
    frozen = {}
    for role, (opened, model) in parts.items():
        if model is None:
            continue
        settings = getattr(config.roles, role)
        dtype = frozen_dtype(settings, model.execution.dtype)
        params = in_dtype(opened.read(model, jnp.dtype(jnp.float32), mesh), model.axes, dtype)
        shardings = role_shardings(settings, mesh, params, model.axes)
        frozen[role] = jax.device_put(params, shardings)
    return frozen


def print_memory(config: PpoConfig, networks: Networks, template: TrainState, mesh: Mesh) -> None:
    """Shows, before anything is compiled, what each role takes of a device's memory."""
    found = []
    for role, model in vars(networks).items():
        if model is None:
            continue
        settings = getattr(config.roles, role)
        dtype, opt_state = frozen_dtype(settings, model.execution.dtype), None
        if role in TRAINED:
            dtype, opt_state = jnp.dtype(jnp.float32), template.opt_state[role]
        found.append(footprint(role, settings, mesh, model, dtype, opt_state))
    found.append(generation_footprint(config.roles, mesh, networks.policy))
    if jax.process_index() == 0:
        Console(stderr=True).print(memory_table(found), highlight=False)
