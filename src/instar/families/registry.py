"""The families that there are, and from a name in a config to a `ModelSpec`.

A family is a file in this room that holds a `FAMILY`; nothing else lists it.
"""

import dataclasses
import functools
import importlib
import pkgutil
from dataclasses import dataclass

from instar import families
from instar.errors import UserError
from instar.families.family import Family
from instar.models.spec import Layer, ModelSpec

SHAPE_FIELDS = ("depth", "width", "heads", "mlp_width")
OWN_FIELDS = ("experts", "experts_per_token", "router_bias", "window")  # of some families


def find_families() -> dict[str, Family]:
    """Each family by its name."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = (
        importlib.import_module(f"{families.__name__}.{n}") for n in names if n != "registry"
    )
    found = (getattr(module, "FAMILY", None) for module in modules)
    return {family.name: family for family in found if family is not None}


FAMILIES = find_families()


@dataclass(frozen=True)
class ModelConfig:
    """A model by family: a published `size`, or `depth`, `width` and `heads`, or both combined.

    Whatever is None is the family's own. `vocab_size` is the tokenizer's and `max_positions` the
    training sequence's where they are None. The families of `experts` have so many MLPs in a layer,
    `experts_per_token` of which read each token; with `router_bias` they are balanced by a bias.
    Those of windows have layers, all or some, in which a token sees `window` keys.
    """

    family: str = "llama"
    size: str | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    tied: bool | None = None
    qk_norm: bool | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    router_bias: bool | None = None
    window: int | None = None

    def check(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(
                f"model.family {self.family!r} is none of those that there are: "
                f"{', '.join(FAMILIES)}"
            )
        for name in OWN_FIELDS:
            if getattr(self, name) is not None and name not in FAMILIES[self.family].options:
                having = [family.name for family in FAMILIES.values() if name in family.options]
                raise UserError(
                    f"model.{name} is nothing that {self.family} has: leave it out, or choose "
                    f"model.family {' or '.join(having)}"
                )
        for name in FAMILIES[self.family].without:
            if getattr(self, name) is not None:
                raise UserError(f"model.{name} is nothing that {self.family} has: leave it out")
        sizes = FAMILIES[self.family].sizes
        if self.size is not None and self.size not in sizes:
            choices = (
                f"choose one of {', '.join(sizes)}" if sizes else "give depth, width and heads"
            )
            raise UserError(f"model.size {self.size!r} is not a size of {self.family}: {choices}")
        for name in ("depth", "width", "heads"):
            if self.size is None and getattr(self, name) is None:
                raise UserError(f"model.{name} is missing: give it, or a published model.size")
        for name in (
            *SHAPE_FIELDS,
            "kv_heads",
            "head_dim",
            "vocab_size",
            "max_positions",
            "window",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} must be at least 1, not {value}")
        shape = self.shape()
        if self.head_dim is None and shape["width"] % shape["heads"]:
            raise UserError(
                f"model.width ({shape['width']}) is not a multiple of model.heads "
                f"({shape['heads']}): change one, or give model.head_dim"
            )

    def shape(self) -> dict[str, int]:
        """The values of SHAPE_FIELDS that are known: the published size's, then those given."""
        published = FAMILIES[self.family].sizes[self.size] if self.size is not None else ()
        shape = dict(zip(SHAPE_FIELDS, published, strict=False))
        given = {name: getattr(self, name) for name in SHAPE_FIELDS}
        return shape | {name: value for name, value in given.items() if value is not None}


def build_spec(config: ModelConfig, *, vocab_size: int, max_positions: int) -> ModelSpec:
    """The spec that `config` describes; the arguments fill what it leaves open.

    Raises:
      UserError: the sizes contradict each other.
    """
    options = {
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size or vocab_size,
        "max_positions": config.max_positions or max_positions,
        "tied": config.tied,
        **{name: getattr(config, name) for name in OWN_FIELDS},
    }
    given = {name: value for name, value in options.items() if value is not None}
    family = FAMILIES[config.family]
    variant = family.variants.get(config.size, {})
    spec = family.build(**{**config.shape(), **variant, **given})
    spec = spec.map_layers(functools.partial(_with_heads, config))
    spec.check()
    return spec


def _with_heads(config: ModelConfig, layer: Layer) -> Layer:
    """The layer with what any family may have fewer or more of than it has by itself."""
    mixer = layer.mixer
    if config.kv_heads is not None:
        mixer = dataclasses.replace(mixer, kv_heads=config.kv_heads)
    if config.qk_norm is not None and config.qk_norm != (mixer.qk_norm is not None):
        mixer = dataclasses.replace(mixer, qk_norm=layer.norm if config.qk_norm else None)
    return dataclasses.replace(layer, mixer=mixer)
