"""One of two processes: they save by clocks that differ, and restore where one of them cannot."""

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from instar.models.parameters import Axes
from instar.sharding import rules
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.sharding.processes import join_processes
from instar.training.checkpoint import CheckpointConfig, Checkpointer
from instar.training.state import TrainState

AXES = {"kernel": Axes(("embed", "mlp"), ("embed",))}


def state(step: int) -> TrainState:
    kernel = jax.random.normal(jax.random.key(step), (512, 64))
    return TrainState(jnp.int32(step), {"kernel": kernel}, (), jnp.zeros(2, jnp.uint32))


def main(folder: str) -> None:
    join_processes()
    first = jax.process_index() == 0
    mesh = make_mesh(MeshConfig(fsdp=2))
    shapes = jax.eval_shape(lambda: state(0))
    shardings = rules.state_shardings(mesh, shapes, AXES)
    make = jax.jit(state, static_argnums=0, out_shardings=shardings)

    # An hour passes at each look at the clock of process 0; that of process 1 stands still.
    hours = itertools.count()
    clock = (lambda: 3600.0 * next(hours)) if first else (lambda: 0.0)
    config = CheckpointConfig(minutes=150)
    checkpointer = Checkpointer(epath.Path(folder), config, clock=clock)
    saved = [step for step in range(1, 20) if checkpointer.due(step)]
    assert saved, "the clock of process 0 decides"
    print("due", saved)

    for step in (1, 2):
        checkpointer.save(step, make(step), input={"row": step}, config={}, lineage={})
    checkpointer.wait()
    if not first:  # what process 1 wrote is what process 1 reads
        for file in Path(folder).glob("checkpoints/2/params/ocdbt.process_1/d/*"):
            file.write_bytes(b"damaged")
    template = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    restored = checkpointer.restore(template)
    checkpointer.close()
    print("restored", restored.step)
    print("damaged", restored.damaged, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
