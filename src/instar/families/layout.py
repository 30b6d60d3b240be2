"""How other programs name and shape the parameters: tables that are read in both directions.

A `Layout` lists the tensors of a foreign checkpoint. Each `Tensor` says by an einops pattern how
the parameters that it holds are laid out in it, `"embed heads head_dim -> (heads head_dim) embed"`:
from left to right to write a checkpoint, from right to left to read one. Parameters are named
below their layer (`mixer.query.kernel`); that layers and experts are stacked here and numbered
there is no concern of the tables, but for a number in the tensor's name.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import einops
import numpy as np

from instar.models.spec import Attention, Experts, Latent, Layer, ModelSpec, Norm

Shape = tuple[int, ...]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a foreign checkpoint.

    Attributes:
      name: its name, with `{layer}` for the number of its layer; where it has `{expert}`, there is
        one such tensor for each expert, and the patterns are those of one.
      parts: each parameter that it holds, by path, and the pattern from ours to theirs.
      join: where there are several parts, the dimension along which they follow one another.
      fold: the pattern from the joined parts to the tensor, where it is not the joined parts.
    """

    name: str
    parts: dict[str, str]
    join: int = 0
    fold: str | None = None

    def shape(self, sizes: Sizes) -> Shape:
        """The tensor's shape."""
        shapes = [_shape(_sides(pattern)[1], sizes) for pattern in self.parts.values()]
        joined = list(shapes[0])
        joined[self.join] = sum(shape[self.join] for shape in shapes)
        if self.fold is None:
            return tuple(joined)
        return _shape(_sides(self.fold)[1], sizes | self._joined_sizes(joined))

    def write(self, parameters: Sequence[np.ndarray], sizes: Sizes) -> np.ndarray:
        """The tensor that holds these parameters, given in the order of `parts`."""
        theirs = [
            _rearrange(parameter, *_sides(pattern), sizes)
            for parameter, pattern in zip(parameters, self.parts.values(), strict=True)
        ]
        joined = theirs[0] if len(theirs) == 1 else np.concatenate(theirs, self.join)
        if self.fold is None:
            return joined
        return _rearrange(joined, *_sides(self.fold), sizes | self._joined_sizes(joined.shape))

    def read(self, tensor: np.ndarray, path: str, sizes: Sizes) -> np.ndarray:
        """The parameter `path` out of the tensor, as a view of it where that is possible."""
        shapes = {p: _shape(_sides(pattern)[1], sizes) for p, pattern in self.parts.items()}
        if self.fold is not None:
            joined = list(shapes[path])
            joined[self.join] = sum(shape[self.join] for shape in shapes.values())
            ours, theirs = _sides(self.fold)
            tensor = _rearrange(tensor, theirs, ours, sizes | self._joined_sizes(joined))
        before = list(self.parts)[: list(self.parts).index(path)]
        start = sum(shapes[p][self.join] for p in before)
        index = [slice(None)] * len(shapes[path])
        index[self.join] = slice(start, start + shapes[path][self.join])
        ours, theirs = _sides(self.parts[path])
        return _rearrange(tensor[tuple(index)], theirs, ours, sizes)

    def _joined_sizes(self, joined: Sequence[int]) -> Sizes:
        names = _sides(self.fold)[0].split()
        return dict(zip(names, joined, strict=True))


@dataclass(frozen=True)
class Layout:
    """The tensors of a foreign checkpoint.

    Attributes:
      outer: those outside the layers.
      layer: those of one layer.
      ignored: names (regular expressions, matched whole) that may be there and hold nothing new.
      prefix: what a checkpoint of the bare model leaves out before each name.
      further: of layers behind the last one that predict tokens further ahead, and are left out:
        what the names of a layer's tensors begin with, and the name below that of one tensor by
        which such a layer is known.
    """

    outer: Callable[[ModelSpec], list[Tensor]]
    layer: Callable[[Layer], list[Tensor]]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    further: tuple[str, str] | None = None

    def tensors(self, spec: ModelSpec) -> "Iterator[Placed]":
        """Every tensor of a model, with where its parameters lie."""
        for tensor in self.outer(spec):
            yield Placed(tensor.name, tensor, sizes_of(spec, None))
        first = 0
        for group, (repeat, period) in enumerate(spec.layers):
            for place, layer in enumerate(period):
                stem, sizes = f"group_{group}.layer_{place}.", sizes_of(spec, layer)
                for index, tensor in itertools.product(range(repeat), self.layer(layer)):
                    number = first + index * len(period) + place
                    if "{expert}" not in tensor.name:
                        name = tensor.name.format(layer=number)
                        yield Placed(name, tensor, sizes, stem, (index,))
                        continue
                    for expert in range(sizes["experts"]):
                        name = tensor.name.format(layer=number, expert=expert)
                        yield Placed(name, tensor, sizes, stem, (index, expert))
            first += repeat * len(period)

    def ignores(self, name: str, stored: Collection[str], spec: ModelSpec) -> bool:
        """Whether a tensor may be there that no part of the model is made from."""
        if any(re.fullmatch(rule, name) for rule in self.ignored):
            return True
        if self.further is None:
            return False
        stem, mark = self.further
        found = re.match(re.escape(stem).replace(r"\{layer\}", r"(\d+)"), name)
        return found is not None and int(found[1]) >= spec.depth and f"{found[0]}{mark}" in stored


@dataclass(frozen=True)
class Placed:
    """A tensor of a checkpoint by its full name, and where in the stacked tree its parts lie.

    The parameter `part` is `stem + part` in the tree, and of that the entry `index` of the first
    dimensions: those of layers and, where the tensor is of one, of experts.
    """

    name: str
    tensor: Tensor
    sizes: Sizes
    stem: str = ""
    index: tuple[int, ...] = ()


def sizes_of(spec: ModelSpec, layer: Layer | None) -> Sizes:
    """The sizes of the axes that patterns name."""
    sizes = {
        "vocab": spec.vocab_size,
        "embed": spec.width,
        "narrow": spec.table_width,
        "positions": spec.max_positions + spec.position_offset,
        "two": 2,
        "four": 4,
    }
    if layer is not None:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mlp, Experts):
            sizes |= {"experts": mlp.count}
            sizes |= {} if mlp.shared is None else {"shared": mlp.shared.width}
            mlp = mlp.expert
        sizes |= {"mlp": mlp.width, "heads": mixer.heads, "head_dim": mixer.head_dim}
        sizes |= _latent_sizes(mixer) if isinstance(mixer, Latent) else _head_sizes(mixer)
    return sizes


def _head_sizes(mixer: Attention) -> Sizes:
    return {
        "kv_heads": mixer.kv_heads,
        "group": mixer.heads // mixer.kv_heads,
        "quarter": mixer.heads // 4,
        "half": mixer.head_dim // 2,
    }


def _latent_sizes(mixer: Latent) -> Sizes:
    sizes = {"latent": mixer.cached_dim, "rank": mixer.rank, "query_rank": mixer.query_rank}
    sizes |= {"query_dim": mixer.query_dim, "value_dim": mixer.value_dim}
    return {name: size for name, size in sizes.items() if size is not None}


def _sides(pattern: str) -> tuple[str, str]:
    ours, theirs = pattern.split("->")
    return ours.strip(), theirs.strip()


def _shape(side: str, sizes: Sizes) -> Shape:
    """The shape of one side of a pattern: "(heads head_dim) embed" -> (heads * head_dim, embed)."""

    def size(name: str) -> int:
        return int(name) if name.isdigit() else sizes[name]

    groups = re.findall(r"\(([^)]*)\)|(\S+)", side)
    return tuple(math.prod(map(size, (inner or single).split())) for inner, single in groups)


def _rearrange(array: np.ndarray, source: str, target: str, sizes: Sizes) -> np.ndarray:
    names = set(re.findall(r"[a-z_]+", source))
    return einops.rearrange(
        array, f"{source} -> {target}", **{name: sizes[name] for name in names & sizes.keys()}
    )


# --- Rows of a table ----------------------------------------------------------------------------


def table(name: str, path: str, axes: str) -> Tensor:
    """A parameter that is stored as it is."""
    return Tensor(name, {path: f"{axes} -> {axes}"})


def linear(name: str, path: str, inputs: str, outputs: str, bias: bool = False) -> list[Tensor]:
    """A torch Linear, [out, in]: `inputs` and `outputs` are the axes of our kernel."""
    pattern = f"{inputs} {outputs} -> ({outputs}) ({inputs})"
    weight = Tensor(f"{name}.weight", {f"{path}.kernel": pattern})
    if not bias:
        return [weight]
    return [weight, Tensor(f"{name}.bias", {f"{path}.bias": f"{outputs} -> ({outputs})"})]


def fused(
    name: str, parts: dict[str, str], bias: bool, fold: str | None = None, inputs: str = "embed"
) -> list[Tensor]:
    """A torch Linear that holds several projections of the same input.

    `parts` and `fold` are patterns of outputs alone ("heads head_dim -> heads 1 head_dim"); where
    there is a fold, the parts follow one another along its second axis.
    """
    sides = {path: _sides(pattern) for path, pattern in parts.items()}
    kernels = {
        f"{path}.kernel": f"{inputs} {ours} -> {theirs} {inputs}"
        for path, (ours, theirs) in sides.items()
    }
    join, weight_fold = 0, None
    if fold is not None:
        ours, theirs = _sides(fold)
        join, weight_fold = 1, f"{ours} {inputs} -> {theirs} {inputs}"
    weight = Tensor(f"{name}.weight", kernels, join, weight_fold)
    if not bias:
        return [weight]
    biases = {f"{path}.bias": each for path, each in parts.items()}
    return [weight, Tensor(f"{name}.bias", biases, join, fold)]


# Queries, keys and values in one matrix: one after the other; or head by head, each head's three
# together; or by the heads that share a key, their queries first.
CHAINED = {
    "mixer.query": "heads head_dim -> (heads head_dim)",
    "mixer.key": "kv_heads head_dim -> (kv_heads head_dim)",
    "mixer.value": "kv_heads head_dim -> (kv_heads head_dim)",
}
BY_HEAD = dict.fromkeys(CHAINED, "heads head_dim -> heads 1 head_dim")
BY_HEAD_FOLD = "heads slots head_dim -> (heads slots head_dim)"
BY_GROUP = {
    "mixer.query": "(kv_heads group) head_dim -> kv_heads group head_dim",
    "mixer.key": "kv_heads head_dim -> kv_heads 1 head_dim",
    "mixer.value": "kv_heads head_dim -> kv_heads 1 head_dim",
}
BY_GROUP_FOLD = "kv_heads slots head_dim -> (kv_heads slots head_dim)"
# A gate and what it multiplies in one matrix.
GATE_UP = {"mlp.gate": "mlp -> mlp", "mlp.up": "mlp -> mlp"}


def norm(name: str, path: str, spec: Norm, axes: str = "embed") -> list[Tensor]:
    """A LayerNorm or an RMSNorm over `axes`."""
    pattern = f"{axes} -> ({axes})"
    scale = Tensor(f"{name}.weight", {f"{path}.scale": pattern})
    return [scale, Tensor(f"{name}.bias", {f"{path}.bias": pattern})] if spec.bias else [scale]
