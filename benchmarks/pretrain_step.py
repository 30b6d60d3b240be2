"""The train step against PyTorch's: the same models, batches and initial parameters, in turns.

    python benchmarks/pretrain_step.py [--json benchmarks/results/pretrain_step.json]

Needs PyTorch (the extra `parity`) and a C++ compiler for torch.compile. Each framework runs in a
process of its own with the launcher's memory settings and the same number of threads; they take
turns of a few steps, so that what else goes on in the machine strikes all alike, and the fastest
turn of each counts. AdamW, clipped to a norm of 1, no dropout, no packing.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile

from _workers import Worker

SCRIPT = "_step_workers.py"
FRAMEWORKS = ("instar", "torch eager", "torch.compile")
SMALL = {"depth": 4, "width": 128, "heads": 4, "vocab_size": 2048, "sequence_length": 64}
LARGE = {"depth": 6, "width": 384, "heads": 6, "vocab_size": 4096, "sequence_length": 256}
# Name, shape, rows of a batch, steps of a turn.
CASES = (
    ("GPT 1M", {"family": "gpt3", **SMALL, "mlp_width": 512}, 32, 8),
    ("LLaMA 1M", {"family": "llama", **SMALL, "mlp_width": 352}, 32, 8),
    ("GPT 12M", {"family": "gpt3", **LARGE, "mlp_width": 1536}, 16, 1),
    ("LLaMA 12M", {"family": "llama", **LARGE, "mlp_width": 1024}, 16, 1),
)


def measure(shape: dict, rows: int, steps: int, turns: int, dtype: str, threads: int) -> dict:
    """Seconds a step of each framework, and what a token costs."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"shape": shape, "batch": rows, "dtype": dtype, "threads": threads}
        job["parameters"] = f"{folder}/parameters.npz"
        # Instar first: it writes the parameters from which the others start.
        workers = {name: Worker(SCRIPT, job | {"framework": name}) for name in FRAMEWORKS}
        seconds = {name: [] for name in FRAMEWORKS}
        for _ in range(turns):
            for name, worker in workers.items():
                seconds[name].append(worker.ask(steps=steps)["seconds"])
        for worker in workers.values():
            worker.close()
    losses = {name: worker.ready["losses"][0] for name, worker in workers.items()}
    spread = max(losses.values()) - min(losses.values())
    if dtype == "float32" and spread > 1e-3:
        sys.exit(f"the first losses differ, so the models are not the same: {losses}")
    facts = workers["instar"].ready
    tokens = rows * shape["sequence_length"]
    speed = {name: tokens / min(times) for name, times in seconds.items()}
    return {
        "parameters": facts["parameters"],
        "dtype": dtype,
        "tokens_per_second": speed,
        "to_compile": speed["instar"] / speed["torch.compile"],
        "to_eager": speed["instar"] / speed["torch eager"],
        "flops_per_second": speed["instar"] * facts["flops_per_token"],
        "matmul_peak": facts["matmul_peak"],
        "versions": {name: worker.ready["version"] for name, worker in workers.items()},
    }


def report_shares(results: dict, dtype: str) -> None:
    """Adds each model's share of the matmul peak: the best of those that its workers measured.

    A single measurement may fall into a busy moment of the machine.
    """
    measured = {name: r for name, r in results.items() if r["dtype"] == dtype}
    peak = max(result["matmul_peak"] for result in measured.values())
    for name, result in measured.items():
        result["share_of_matmul_peak"] = share = result["flops_per_second"] / peak
        print(f"{name}: {share:.1%} of the measured matmul peak ({peak / 1e9:.0f} GFLOP/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/pretrain_step.json")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    names = [name for name, *_ in CASES]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{'model':12}{'type':10}{'instar':>10}{'eager':>10}{'compile':>10}  tokens/s"
        f"{'/eager':>10}{'/compile':>10}{'GFLOP/s':>10}"
    )
    results = {}
    for dtype in arguments.dtypes:
        for name, shape, rows, steps in (c for c in CASES if c[0] in arguments.models):
            result = measure(shape, rows, steps, arguments.turns, dtype, threads)
            results[f"{name} {dtype}"] = result
            speed = result["tokens_per_second"]
            print(
                f"{name:12}{dtype:10}{speed['instar']:10,.0f}{speed['torch eager']:10,.0f}"
                f"{speed['torch.compile']:10,.0f}{'':10}{result['to_eager']:10.2f}"
                f"{result['to_compile']:10.2f}{result['flops_per_second'] / 1e9:10.0f}",
                flush=True,
            )
        report_shares(results, dtype)
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "threads": threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    path.write_text(json.dumps(header | {"measured": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
