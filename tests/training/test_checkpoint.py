"""Checkpoints: bit-exact, kept by policy, and any damage to one costs no more than that one."""

import contextlib
import gc
import json
import multiprocessing
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from etils import epath
from several import run_pair

from instar.errors import RunError, UserError
from instar.models.parameters import Axes
from instar.sharding import rules
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.checkpoint import CheckpointConfig, Checkpointer
from instar.training.state import TrainState

AXES = {
    "embedding": Axes(("vocab", "embed")),
    "mlp": {"kernel": Axes(("layers", "embed", "mlp"), ("embed",)), "bias": Axes(("mlp",))},
    "half": Axes(("embed",)),
}
# The table is most of a checkpoint, so that its largest file holds numbers; its vocabulary divides
# over no mesh of several devices.
SHAPES = {"embedding": (63, 48), "mlp": {"kernel": (3, 16, 8), "bias": (8,)}, "half": (16,)}
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
NEVER = CheckpointConfig(minutes=None)

# Orbax reads several arrays at once, and nobody asks for the second error that damage causes.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collect() -> Iterator[None]:
    """Lets go of those errors here, where they are ignored."""
    yield
    gc.collect()


def bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Random bits, so that NaNs with payloads, subnormals and -0.0 are among the numbers."""
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 256, (*shape, size), np.uint8).view(dtype).reshape(shape)


def values(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda shape: bits(rng, shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    params["half"] = bits(rng, SHAPES["half"], ml_dtypes.bfloat16)
    params["embedding"][0, :3] = [-0.0, np.inf, 1e-45]
    moments = jax.tree.map(lambda x: bits(rng, x.shape, x.dtype.type), params)
    return TrainState(
        step=np.int32(seed),
        params=params,
        opt_state=(optax.ScaleByAdamState(np.int32(seed), moments, params), optax.EmptyState()),
        key=bits(rng, (2,), np.uint32),
        buffers={"router": bits(rng, (5,), np.float32)},
    )


def template(mesh: MeshConfig) -> TrainState:
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, values(0)))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        rules.state_shardings(make_mesh(mesh, devices), shapes, AXES),
    )


def state(seed: int, mesh: MeshConfig = ONE) -> TrainState:
    return jax.device_put(values(seed), jax.tree.map(lambda t: t.sharding, template(mesh)))


def same_bits(a: TrainState, b: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == y.tobytes()
        for x, y in pairs
    )


@contextlib.contextmanager
def checkpointer(
    folder: Path, config: CheckpointConfig = NEVER, **options
) -> Iterator[Checkpointer]:
    found = Checkpointer(epath.Path(folder), config, **options)
    try:
        yield found
    finally:
        found.close()


def save(found: Checkpointer, step: int, mesh: MeshConfig = ONE) -> None:
    lineage = {"stage": "test", "tokens": 1000 * step}
    config = {"steps": 100, "nested": {"name": "é"}}
    found.save(step, state(step, mesh), input={"row": 8 * step}, config=config, lineage=lineage)


def fill(folder: Path, *steps: int, mesh: MeshConfig = ONE) -> None:
    with checkpointer(folder) as found:
        for step in steps:
            save(found, step, mesh)


def on_disk(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


# --- Whole checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [ONE, EIGHT], ids=["one", "eight"])
def test_every_bit_comes_back_on_any_mesh(tmp_path, saved):
    fill(tmp_path, 3, mesh=saved)
    for mesh in (ONE, EIGHT, MeshConfig(1, 8, 1), MeshConfig(1, 2, 4)):
        with checkpointer(tmp_path) as found:
            restored = found.restore(template(mesh))
        assert same_bits(restored.state, values(3))
        expected = jax.tree.map(lambda t: t.sharding, template(mesh))
        assert jax.tree.map(lambda x: x.sharding, restored.state) == expected
        assert (restored.step, restored.input, restored.damaged) == (3, {"row": 24}, ())
        assert restored.lineage["stage"] == "test" and restored.lineage["tokens"] == 3000


def test_what_is_beside_the_state_can_be_read_without_instar(tmp_path):
    fill(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "3"
    read = {
        name: json.loads((folder / name / f"{name}.json").read_text())
        for name in ("input", "config", "lineage")
    }
    assert read["input"] == {"row": 24}
    assert read["config"] == {"steps": 100, "nested": {"name": "é"}}
    assert read["lineage"]["step"] == 3 and len(read["lineage"]["fingerprint"]) == 64


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    with checkpointer(tmp_path) as found:
        given = state(3)
        found.save(3, given, input={}, config={}, lineage={})
        jax.tree.map(lambda x: x.delete(), given)
        found.wait()
        assert same_bits(found.restore(template(ONE)).state, values(3))


def test_an_empty_folder_has_nothing(tmp_path):
    with checkpointer(tmp_path) as found:
        assert found.latest_step() is None
        assert found.restore(template(ONE)) is None


def test_saving_a_step_twice_saves_it_once(tmp_path):
    """The last step may be due, final and interrupted at once."""
    with checkpointer(tmp_path) as found:
        save(found, 3)
        save(found, 3)
    with checkpointer(tmp_path) as found:
        found.restore(template(ONE))
        save(found, 3)
    assert on_disk(tmp_path) == [3]


# --- Policies -----------------------------------------------------------------------------------


def test_the_newest_two_and_every_nth_are_kept(tmp_path):
    with checkpointer(tmp_path, CheckpointConfig(minutes=None, keep_steps=4)) as found:
        for step in (2, 4, 5, 7, 8, 9, 10):
            save(found, step)
        found.wait()
        assert on_disk(tmp_path) == [4, 8, 9, 10]
        assert found.latest_step() == 10


def test_without_steps_to_keep_the_newest_two_are_kept(tmp_path):
    fill(tmp_path, 1, 2, 3, 4)
    assert on_disk(tmp_path) == [3, 4]


def test_due_by_the_clock_and_by_steps(tmp_path):
    now = [100.0]
    config = CheckpointConfig(minutes=2.0, keep_steps=10)
    with checkpointer(tmp_path, config, clock=lambda: now[0]) as found:
        assert not found.due(1)
        now[0] += 119.9
        assert not found.due(2)
        assert found.due(10) and found.due(20) and not found.due(15)
        now[0] += 0.2
        assert found.due(3)
        save(found, 3)
        assert not found.due(4), "the clock starts again at a save"
        now[0] += 121
        assert found.due(5)


def test_without_policies_nothing_is_due(tmp_path):
    now = [0.0]
    with checkpointer(tmp_path, NEVER, clock=lambda: now[0]) as found:
        now[0] = 1e9
        assert not any(found.due(step) for step in range(1, 200))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CheckpointConfig(minutes=0.0), "checkpoint.minutes must be positive or None"),
        (CheckpointConfig(keep_steps=0), "checkpoint.keep_steps must be at least 1"),
    ],
)
def test_values_that_make_no_sense(config, message):
    with pytest.raises(UserError, match=message):
        config.check()


# --- Damage -------------------------------------------------------------------------------------


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def invert(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))


def rewrite(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


DAMAGE = {
    "inverted": lambda folder: invert(largest(folder)),
    "truncated": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size // 2),
    "emptied": lambda folder: os.truncate(largest(folder), 0),
    "largest file gone": lambda folder: largest(folder).unlink(),
    "state gone": lambda folder: shutil.rmtree(folder / "state"),
    "input gone": lambda folder: shutil.rmtree(folder / "input"),
    "lineage gone": lambda folder: shutil.rmtree(folder / "lineage"),
    "lineage garbled": lambda folder: (folder / "lineage" / "lineage.json").write_text('{"step"'),
    "input of another": lambda folder: rewrite(
        folder / "input" / "input.json", lambda x: {"row": x["row"] + 1}
    ),
    "fingerprint of another": lambda folder: rewrite(
        folder / "lineage" / "lineage.json", lambda x: x | {"fingerprint": "0" * 64}
    ),
    "all files emptied": lambda folder: [
        os.truncate(p, 0) for p in folder.rglob("*") if p.is_file()
    ],
    "nothing left in it": lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_falls_back_to_the_one_before(tmp_path, name):
    fill(tmp_path, 4, 8)
    newest = tmp_path / "checkpoints" / "8"
    DAMAGE[name](newest)
    content = sorted(p.name for p in newest.iterdir())
    with checkpointer(tmp_path) as found:
        restored = found.restore(template(ONE))
        assert restored.step == 4 and same_bits(restored.state, values(4))
        assert restored.input == {"row": 32}
        (reason,) = restored.damaged
        assert reason.startswith("step 8: ") and "\n" not in reason
        # Set aside whole, not deleted; and the run saves at that step again.
        (aside,) = (tmp_path / "damaged").iterdir()
        assert aside.name.startswith("8-") and sorted(p.name for p in aside.iterdir()) == content
        assert on_disk(tmp_path) == [4] and found.latest_step() == 4
        save(found, 8)
    with checkpointer(tmp_path) as found:
        restored = found.restore(template(ONE))
        assert restored.step == 8 and same_bits(restored.state, values(8))
        assert restored.damaged == ()


def test_one_flipped_bit_costs_the_checkpoint_or_changes_nothing(tmp_path):
    """Not every byte of a file is read; but no bit that is read may come back changed."""
    fill(tmp_path / "whole", 4, 8)
    size = largest(tmp_path / "whole" / "checkpoints" / "8").stat().st_size
    detected = 0
    for number, bit in enumerate(np.linspace(0, 8 * size - 1, 12, dtype=int)):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        flip(largest(copy / "checkpoints" / "8"), int(bit))
        with checkpointer(copy) as found:
            restored = found.restore(template(ONE))
        assert restored.step in (4, 8) and same_bits(restored.state, values(restored.step))
        assert len(restored.damaged) == (restored.step == 4)
        detected += restored.step == 4
    assert detected >= 6


def test_a_deleted_folder_is_as_if_it_had_never_been(tmp_path):
    fill(tmp_path, 4, 8)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    with checkpointer(tmp_path) as found:
        restored = found.restore(template(ONE))
        assert restored.step == 4 and restored.damaged == ()
        save(found, 8)
    assert on_disk(tmp_path) == [4, 8]


def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path):
    """Orbax writes to a folder with another name and renames it once it is whole."""
    fill(tmp_path, 4, 8)
    unfinished = tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp-0"
    shutil.copytree(tmp_path / "checkpoints" / "8", unfinished)
    with checkpointer(tmp_path) as found:
        assert found.latest_step() == 8
        assert found.restore(template(ONE)).step == 8
    assert not unfinished.exists()


def test_several_damaged_ones_are_all_named(tmp_path):
    with checkpointer(tmp_path, CheckpointConfig(minutes=None, keep_steps=1)) as found:
        for step in (1, 2, 3):
            save(found, step)
    for step in ("2", "3"):
        invert(largest(tmp_path / "checkpoints" / step))
    with checkpointer(tmp_path, CheckpointConfig(minutes=None, keep_steps=1)) as found:
        restored = found.restore(template(ONE))
    assert restored.step == 1
    assert [reason[:7] for reason in restored.damaged] == ["step 3:", "step 2:"]


def test_if_none_can_be_read_the_user_decides_and_nothing_moves(tmp_path):
    """Twice: a second start must not find an empty folder and begin at step 0."""
    fill(tmp_path, 4, 8)
    for step in ("4", "8"):
        invert(largest(tmp_path / "checkpoints" / step))
    for _ in range(2):
        with (
            checkpointer(tmp_path) as found,
            pytest.raises(UserError, match=r"no checkpoint in .* can be read \(step 8: .*step 4: "),
        ):
            found.restore(template(ONE))
        assert on_disk(tmp_path) == [4, 8]


def test_a_template_that_does_not_fit_is_no_damage(tmp_path):
    """The wrong model must not cost the checkpoints of the right one."""
    fill(tmp_path, 4, 8)
    other = template(ONE)
    other.params["embedding"] = jax.ShapeDtypeStruct(
        (64, 47), np.float32, sharding=other.params["half"].sharding
    )
    with checkpointer(tmp_path) as found, pytest.raises(UserError):
        found.restore(other)
    with checkpointer(tmp_path) as found:
        assert found.restore(template(ONE)).step == 8


# --- Folders that cannot be written to ----------------------------------------------------------


def save_on_a_full_disk(folder: Path) -> None:
    """A disk that is full, for files beyond 8 kB; Python ignores the signal that comes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    found = Checkpointer(epath.Path(folder), NEVER)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    with pytest.raises(RunError, match=r"step 8 in .* not be written"):
        save(found, 8)
        found.wait()


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path):
    fill(tmp_path, 4)
    # A process of its own, as a run is: what still writes when one file fails ends with it.
    run = multiprocessing.get_context("spawn").Process(target=save_on_a_full_disk, args=(tmp_path,))
    run.start()
    run.join()
    assert run.exitcode == 0
    with checkpointer(tmp_path) as found:
        restored = found.restore(template(ONE))
        assert restored.step == 4 and same_bits(restored.state, values(4))
        save(found, 8)
    assert on_disk(tmp_path) == [4, 8]


def test_a_folder_that_cannot_be_written_to_ends_the_run(tmp_path):
    found = Checkpointer(epath.Path(tmp_path), NEVER)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    threads = set(threading.enumerate())
    with pytest.raises(RunError, match="see that the folder can be written to"):
        save(found, 4)
        found.wait()
    # A thread that waits for a folder that never comes keeps the process from ending.
    left = [t for t in set(threading.enumerate()) - threads if t.is_alive() and not t.daemon]
    assert not left
    with contextlib.suppress(RunError):
        found.close()


def test_two_processes_save_and_restore_together(tmp_path):
    """Though their clocks differ, and though one of them cannot read the newest checkpoint."""
    pair = run_pair(Path(__file__).with_name("saves_together.py"), tmp_path)
    said = [[line for line in out.splitlines() if line[:3] in ("due", "res")] for _, out in pair]
    assert [code for code, _ in pair] == [0, 0], pair
    assert said[0] == said[1] and said[0][-1] == "restored 1", pair
    assert "process 1 could not read it" in pair[0][1]
