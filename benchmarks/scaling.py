"""What a device sends in a training step, and what memory it needs, as devices are added.

    python benchmarks/scaling.py [--json benchmarks/results/scaling.json]

Each step is compiled for that many virtual devices, and nothing is run: bytes are those of the
program's exchanges (see `_collectives`), memory is that of its arguments and of what it makes
between. A row for each device, so that a device has the same work on every mesh. All is in float32:
in bfloat16 activations and gathered weights are half of that, and gradients are not.

The step is written as for a TPU (of the few operations that have a form for CPUs alone, none is in
it) and partitioned by XLA, but finished by its CPU backend. That sums gradients by an all-reduce of
which a device keeps its part, where those for GPUs and TPUs make a reduce-scatter of half the
bytes; it keeps the weights of attention of a layer, where their kernels do not; and tokens find
their experts by a gather, for want of `ragged_all_to_all`. Without a plot: --plot ''.
"""

import argparse
import json
import os
import pathlib
import time

from _collectives import bytes_by_axes, collectives

COUNTS = (8, 32, 128, 512)
DENSE = {"family": "llama", "depth": 16, "width": 2048, "heads": 32, "kv_heads": 8}
DENSE |= {"mlp_width": 8192, "vocab_size": 32_000}
EXPERTS = DENSE | {"family": "mixtral", "mlp_width": 2048, "experts": 8}
LENGTH = 4096
# By name: a model, and the sizes of its mesh for n devices. A machine has 8 of them.
CASES = {
    "data": ("dense", lambda n: {"data": n, "fsdp": 1}),
    "fsdp": ("dense", lambda n: {"fsdp": n}),
    "slice × fsdp 8": ("dense", lambda n: {"slice": n // 8, "fsdp": 8}),
    "fsdp × tensor 8": ("dense", lambda n: {"fsdp": n // 8, "tensor": 8}),
    "fsdp × context 8": ("dense", lambda n: {"fsdp": n // 8, "context": 8}),
    "fsdp × expert 8": ("experts", lambda n: {"fsdp": n // 8, "expert": 8}),
}


def measure(model: dict, mesh_sizes: dict[str, int], devices: int, length: int) -> dict:
    """What one device sends and holds, in bytes, in the step of that model on that mesh."""
    import jax
    from _train_step import make_train_step

    from instar.config import build
    from instar.sharding.mesh import make_mesh
    from instar.stages.pretrain import PretrainConfig
    from instar.training.flops import parameter_count

    values = {
        "model": model,
        "data": {"path": "", "sequence_length": length},
        "batch": {"size": devices},
        "steps": 1,
        "mesh": mesh_sizes,
        "execution": {"remat": "attention", "loss_chunk": length // 8},
    }
    config = build(values, PretrainConfig)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    train = make_train_step(config, mesh)
    started = time.perf_counter()
    compiled = train.compile("tpu")
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    sent = bytes_by_axes(collectives(compiled.as_text(), devices), dict(mesh.shape))
    return {
        "parameters": parameter_count(train.spec).total,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "sent": sent,
        "sent_bytes": sum(sum(kinds.values()) for kinds in sent.values()),
        "state_bytes": memory.argument_size_in_bytes,
        "between_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def plot(measured: dict[str, dict[int, dict]], path: pathlib.Path) -> None:
    """Bytes sent, memory of the state, and memory between, over devices: a line for each mesh."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure = Figure((12, 4.4), layout="constrained")
    panels = (
        ("sent_bytes", "sent by a device in a step (GB)"),
        ("state_bytes", "parameters and optimiser on a device (GB)"),
        ("between_bytes", "activations and gradients on a device (GB)"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, marker in zip(measured, "osv^Dx", strict=False):
            values = [result[key] / 1e9 for result in measured[name].values()]
            axes.plot(list(measured[name]), values, marker=marker, label=name, linewidth=1.4)
        axes.set_xscale("log", base=2)
        if key == "between_bytes":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({count for line in measured.values() for count in line}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("devices")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/scaling.json")
    parser.add_argument("--plot", default="benchmarks/results/scaling.svg")
    parser.add_argument("--devices", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--meshes", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--small", action="store_true", help="models of a few thousand parameters")
    arguments = parser.parse_args()
    # Before JAX starts.
    count = max(arguments.devices)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"

    import jax

    small = {"depth": 2, "width": 64, "heads": 8, "kv_heads": 8, "mlp_width": 96}
    small |= {"vocab_size": 512}
    models = {"dense": DENSE, "experts": EXPERTS}
    if arguments.small:
        models = {name: model | small for name, model in models.items()}
    length = 64 if arguments.small else LENGTH
    print(
        f"{'mesh':18}{'devices':>8}{'sent GB':>10}{'state GB':>10}{'between GB':>12}  by axis, GB"
    )
    measured: dict[str, dict[int, dict]] = {}
    for name in arguments.meshes:
        model, sizes = CASES[name]
        for devices in sorted(arguments.devices):
            result = measure(models[model], sizes(devices), devices, length)
            measured.setdefault(name, {})[devices] = result
            axes = {axes: sum(kinds.values()) / 1e9 for axes, kinds in result["sent"].items()}
            shown = (result[key] / 1e9 for key in ("sent_bytes", "state_bytes", "between_bytes"))
            sent, state, between = shown
            told = ", ".join(f"{axis} {size:.3g}" for axis, size in axes.items())
            print(
                f"{name:18}{devices:8}{sent:10.3g}{state:10.3g}{between:12.3g}  {told}", flush=True
            )
    facts = {"jax": jax.__version__, "sequence_length": length, "models": models}
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"measured": measured}, indent=2) + "\n")
    if arguments.plot:
        plot(measured, pathlib.Path(arguments.plot))


if __name__ == "__main__":
    main()
