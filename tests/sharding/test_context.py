"""What devices that share rows send each other, read from the compiled step."""

import re

import jax
import numpy as np
import pytest

from instar.families import llama
from instar.models import matmul
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.attention import choose_attention
from instar.sharding.execution import on_mesh
from instar.sharding.mesh import MeshConfig, make_mesh

# No size of a parameter, or of a device's part of a row or of a chunk, is a multiple of the chunk.
ROWS, LENGTH, CHUNK = 6, 168, 56
SPEC = llama.llama(depth=2, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=24, vocab_size=40)
FIELDS = ("tokens", "positions", "segment_ids", "targets", "weights")


def compiled_step(config: MeshConfig) -> str:
    """The program of a gradient, with rows and their losses in chunks."""
    mesh = make_mesh(config)
    execution = Execution(attend=choose_attention(mesh), remat="full")
    model = LanguageModel(SPEC, on_mesh(mesh, execution))

    def loss(params, batch):
        places = {name: batch[name] for name in ("positions", "segment_ids")}
        hidden, _ = model.apply(params, batch["tokens"], **places)
        head = model.head(params)
        return next_token_sums(hidden, head, batch["targets"], batch["weights"], CHUNK)["nats"]

    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.shapes,
        rules.param_shardings(mesh, model.axes, model.shapes),
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            (ROWS, LENGTH),
            np.float32 if name == "weights" else np.int32,
            sharding=rules.row_sharding(mesh),
        )
        for name in FIELDS
    }
    shardings = jax.tree.map(lambda p: p.sharding, params)
    step = jax.jit(jax.grad(loss), out_shardings=shardings)
    return step.lower(params, batch).compile().as_text()


def collectives(program: str, kind: str) -> list[tuple[int, ...]]:
    """The shapes of what all operations of a kind result in."""
    found = []
    for line in program.splitlines():
        result, operation, _ = line.partition(f" {kind}(")
        if operation:
            shapes = re.findall(r"\w+\[([\d,]*)\]", result.partition(" = ")[2])
            found += [tuple(int(size) for size in shape.split(",") if size) for shape in shapes]
    return found


@pytest.mark.parametrize(
    "config", [MeshConfig(fsdp=2, context=4), MeshConfig(fsdp=2, context=2, tensor=2)], ids=str
)
def test_no_activation_is_gathered_where_rows_are_split(config, monkeypatch):
    """Keys and values travel, and parameters are gathered; no row or chunk of one is ever whole.

    With the products of an accelerator: a CPU's merge rows for the gradients of parameters.
    """
    monkeypatch.setattr(matmul, "_merged", lambda x, g, dtype: matmul._apart(x, g, 0, dtype))
    program = compiled_step(config)
    assert collectives(program, "collective-permute")
    assert collectives(program, "all-gather")
    for kind in ("all-gather", "all-to-all", "all-reduce", "reduce-scatter"):
        for shape in collectives(program, kind):
            assert all(size % CHUNK for size in shape), (kind, shape)
