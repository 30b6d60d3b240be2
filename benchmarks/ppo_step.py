"""An iteration of PPO against TRL's: the same models, batch and updates, in turns.

    python benchmarks/ppo_step.py [--json benchmarks/results/ppo_step.json]

Needs TRL, PyTorch and transformers (the extra `peers`). Policy, reference, critic and reward model
are of one shape and begin with the same weights, which is checked. Each system runs in a process of
its own on the same cores; they take turns of one iteration, so that what else goes on in the
machine strikes both alike, and the ratio is the median of the turns'. What follows Instar's
responses on the host (decoding, diversity) has no counterpart in TRL, and is counted as well.

On a machine that others use, run it on one core (taskset -c 0): PyTorch's threads wait for one
another at every operation, and on shared cores an iteration takes many times as long.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile

from _workers import Worker

SCRIPT = "_ppo_workers.py"
SYSTEMS = ("instar", "trl")
PHASES = ("rollout", "assess", "texts", "update", "rest")
SMALL = {"depth": 4, "width": 128, "heads": 4, "mlp_width": 352, "vocab_size": 2048}
LARGE = {"depth": 6, "width": 384, "heads": 6, "mlp_width": 1024, "vocab_size": 4096}
TINY = {"depth": 1, "width": 16, "heads": 2, "mlp_width": 32, "vocab_size": 320}
# Shape, responses of an iteration, of an update.
CASES = {"LLaMA 1M": (SMALL, 128, 64), "LLaMA 12M": (LARGE, 64, 64), "tiny": (TINY, 8, 4)}
VERSIONS = ("version", "torch", "transformers")
AGREED = 1e-3


def measure(job: dict, turns: int) -> dict:
    """Seconds of an iteration of both, their ratio, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        job = job | {"weights": f"{folder}/weights"}
        # Instar first: it writes the weights from which TRL starts.
        workers = {name: Worker(SCRIPT, job | {"system": name}) for name in SYSTEMS}
        found: dict[str, list[dict]] = {name: [] for name in SYSTEMS}
        apart = []
        for _ in range(turns):
            for name, worker in workers.items():
                found[name].append(worker.ask(apart=False))
            apart.append(workers["instar"].ask(apart=True))
        for worker in workers.values():
            worker.close()
    ours, theirs = (worker.ready["agreed"] for worker in workers.values())
    if any(abs(a - b) > AGREED for a, b in zip(ours, theirs, strict=True)):
        sys.exit(f"the models are not the same: they give {ours} and {theirs}")
    facts = workers["instar"].ready
    # TRL's phases wait for one another anyway.
    phases = {"instar": phases_of(apart), "trl": phases_of(found["trl"])}
    return {
        "parameters": facts["parameters"],
        "rows": job["rows"],
        "minibatch": job["minibatch"],
        "seconds": spread(found, "seconds"),
        "cpu_seconds": spread(found, "cpu_seconds"),
        "ratio": ratios(found, "seconds"),
        "cpu_ratio": ratios(found, "cpu_seconds"),
        "phases": phases,
        "share_of_matmul_peak": {
            name: {
                phase: flops / phases[name][phase] / facts["matmul_peak"]
                for phase, flops in flops_of(job, facts["flops_per_token"], name).items()
            }
            for name in SYSTEMS
        },
        "matmul_peak": facts["matmul_peak"],
        "versions": {
            name: {key: worker.ready[key] for key in VERSIONS if key in worker.ready}
            for name, worker in workers.items()
        },
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(found: dict[str, list[dict]], unit: str) -> dict[str, dict]:
    return {name: summary([turn[unit] for turn in turns]) for name, turns in found.items()}


def ratios(found: dict[str, list[dict]], unit: str) -> dict[str, float]:
    """How many times as long TRL's iteration takes as Instar's of the same turn."""
    pairs = zip(found["trl"], found["instar"], strict=True)
    return summary([theirs[unit] / ours[unit] for theirs, ours in pairs])


def phases_of(turns: list[dict]) -> dict[str, float]:
    """Seconds of each phase: those of the turn that took the shortest."""
    turn = min(turns, key=lambda turn: turn["seconds"])
    rest = turn["seconds"] - sum(turn["phases"].values())
    return {phase: turn["phases"].get(phase, 0.0) for phase in PHASES[:-1]} | {"rest": rest}


def flops_of(job: dict, per_token: dict[str, float], system: str) -> dict[str, float]:
    """Model FLOP of each phase. TRL assesses with the log-probabilities that it sampled with."""
    tokens = job["rows"] * (job["prompt"] + job["new"])
    policy, scalar = per_token["policy"], per_token["scalar"]
    read = {"instar": 2 * policy + 2 * scalar, "trl": policy + 2 * scalar}[system]
    update = 3 * job["epochs"] * (policy + scalar)
    return {
        "rollout": policy * tokens,
        "assess": read * tokens,
        "update": update * tokens,
    }


def show(name: str, result: dict) -> None:
    """Prints the ratios, and a table of the phases."""
    for unit, ratio in (("by the clock", "ratio"), ("of the processor", "cpu_ratio")):
        r = result[ratio]
        print(f"{name}: {r['median']:.1f} times ({r['min']:.1f} to {r['max']:.1f}), seconds {unit}")
    print(f"{'':10}" + "".join(f"{phase:>18}" for phase in PHASES))
    for system in SYSTEMS:
        phases, shares = result["phases"][system], result["share_of_matmul_peak"][system]
        total = sum(phases.values())
        cells = [
            f"{phases[phase]:.3f} s {phases[phase] / total:4.0%}"
            + (f" {shares[phase]:4.0%}" if phase in shares else " " * 5)
            for phase in PHASES
        ]
        print(f"{system:10}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/ppo_step.json")
    parser.add_argument("--models", nargs="+", default=list(CASES)[:2], choices=CASES)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print("seconds, share of the iteration and, where it is known, of the matmul peak")
    results = {}
    header = {
        "prompt": arguments.prompt,
        "new": arguments.new,
        "epochs": arguments.epochs,
        "threads": threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    for name in arguments.models:
        shape, rows, minibatch = CASES[name]
        job = {
            "shape": shape | {"max_positions": arguments.prompt + arguments.new},
            "rows": rows,
            "minibatch": minibatch,
            "epochs": arguments.epochs,
            "prompt": arguments.prompt,
            "new": arguments.new,
            "threads": threads,
        }
        load = [os.getloadavg()[0]]
        results[name] = measure(job, arguments.turns)
        # How many programs wanted to run, this benchmark's among them: before and after.
        results[name]["load"] = [*load, os.getloadavg()[0]]
        show(name, results[name])
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header | {"measured": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
