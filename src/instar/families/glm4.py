"""GLM-4-0414: see `instar.families.glm`."""

from typing import Any

from instar.families import glm
from instar.families.family import Family, HubFormat
from instar.models.spec import ModelSpec


def glm4(**options: Any) -> ModelSpec:
    """A GLM-4-0414 of any size; see `glm.glm`."""
    return glm.glm(**{"around": True, **options})


FAMILY = Family(
    "glm4",
    glm4,
    hub=HubFormat(
        ("glm4",),
        "Glm4ForCausalLM",
        glm.read_config_around,
        glm.write_config,
        glm.LAYOUT,
        scorer="Glm4ForSequenceClassification",
    ),
)
