"""What a family of models is: one value of this type in each file that describes one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from instar.families.hub_config import HubConfig
from instar.families.layout import Layout
from instar.models.spec import ModelSpec


@dataclass(frozen=True)
class HubFormat:
    """A family as Hugging Face's transformers stores it.

    Attributes:
      model_types: the values of `model_type` in config.json that it reads; it writes the first.
      architecture: the class of transformers that has the language-model head.
      read_config: a config.json to a spec; refuses what this code does not do.
      write_config: a spec to the fields of a config.json, `model_type` aside.
      layout: its tensors.
      marked_by: a field that config.json has where several families share a `model_type`.
      own_code: the class comes with the weights and not with transformers; a model is written so
        where transformers has none that is the same.
      scorer: the class of transformers that has a score in the place of the head, if there is one.
    """

    model_types: tuple[str, ...]
    architecture: str
    read_config: Callable[[HubConfig], ModelSpec]
    write_config: Callable[[ModelSpec], dict[str, Any]]
    layout: Layout
    marked_by: str | None = None
    own_code: bool = False
    scorer: str | None = None


@dataclass(frozen=True)
class GgufFormat:
    """A family as llama.cpp stores it.

    Attributes:
      architecture: the value of `general.architecture`.
      fields: what each field of config.json is called below the architecture's name.
      layout: its tensors.
      adapt: further fields of config.json, from (metadata, tensors, the file's name).
    """

    architecture: str
    fields: Mapping[str, str]
    layout: Layout
    adapt: Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, Any]] = (
        lambda metadata, stored, source: {}
    )


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      build: from sizes to a spec; `sizes` are the published ones, as values of
        `registry.SHAPE_FIELDS`.
      variants: what a published size has besides, as further arguments of `build`; vocabulary and
        positions are the tokenizer's and the training's.
      options: the fields of `registry.ModelConfig` that it has beyond those of every family.
      without: those of every other family that it has not.
      hub, gguf: the formats in which its weights are found elsewhere.
    """

    name: str
    build: Callable[..., ModelSpec]
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    hub: HubFormat | None = None
    gguf: GgufFormat | None = None
