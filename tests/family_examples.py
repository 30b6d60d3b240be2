"""Every family in small."""

from instar.families.registry import FAMILIES
from instar.models.spec import ModelSpec

SMALL = {"depth": 3, "width": 32, "heads": 4, "mlp_width": 40, "vocab_size": 31}
SMALL |= {"max_positions": 64}
# Special tokens that the small vocabulary has, and windows that the texts outgrow.
OWN = {"chatglm1": {"start_id": 30, "mask_ids": (29, 28)}}
OWN |= {name: {"window": 5} for name in ("mistral", "gemma2", "gemma3", "gpt_neo", "gpt3")}
OWN |= {name: {"experts": 4, "experts_per_token": 2} for name in ("mixtral", "qwen3_moe")}
OWN["deepseek_v3"] = {"experts": 8, "experts_per_token": 2, "groups": 4, "top_groups": 2}
OWN["deepseek_v3"] |= {"query_rank": 10}


def small_spec(name: str, **changes: object) -> ModelSpec:
    """A model of three layers of the family of that name."""
    return FAMILIES[name].build(**SMALL | OWN.get(name, {}) | changes)
