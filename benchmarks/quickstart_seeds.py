"""The quickstart with several seeds: does PPO do what it should each time, and at what cost?

    python benchmarks/quickstart_seeds.py --ratings "$(launch/local.sh ratings)" --seeds 1 2 3

Each seed is a chain of its own, from pretraining to the comparison; what is held out is the same in
all. Every seed's figures go into benchmarks/results/quickstart_seeds.json, whatever they are. A
chain that was stopped goes on.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from instar.config import load
from instar.stages.pipeline import PipelineConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs/pipeline/quickstart.py"
RESULTS = ROOT / "benchmarks/results/quickstart_seeds.json"
SEEDED = ("pretrain", "sft", "labels", "reward", "ppo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratings", required=True, help="the archive of the demonstration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs/seeds")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    found = {}
    for seed in options.seeds:
        folder = options.runs / str(seed)
        run_chain(folder, seed, options.ratings)
        found[str(seed)] = figures(folder)
        print_checks(seed, found[str(seed)])
        options.results.write_text(json.dumps(found, indent=1) + "\n")


def run_chain(folder: pathlib.Path, seed: int, ratings: str) -> None:
    """Runs what is not done yet of a seed's chain; ends this program where it fails."""
    names = [step.name for step in load(str(CONFIG), [], PipelineConfig).stages]
    changes = [
        f"--config.stages.{names.index('demonstration')}.options.ratings={ratings}",
        *(f"--config.stages.{names.index(name)}.overrides.seed={seed}" for name in SEEDED),
    ]
    command = [sys.executable, "-m", "instar", "pipeline", "--config", str(CONFIG)]
    done = subprocess.run([*command, "--workdir", str(folder), *changes], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def figures(folder: pathlib.Path) -> dict:
    """What is kept of a chain."""
    compared = read(folder / "compare/compare.json")
    judged = read(folder / "reward/reward.json")
    steps = read(folder / "pipeline.json")
    return {
        "checks": compared["checks"],
        "models": {
            name: {key: value for key, value in model.items() if key not in ("path", "digest")}
            for name, model in compared["models"].items()
        },
        # The baseline's files are paths of the machine.
        "reward": {key: value for key, value in judged.items() if key != "baseline"},
        "seconds": {name: round(step["seconds"], 1) for name, step in steps.items()},
    }


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def print_checks(seed: int, found: dict) -> None:
    verdicts = ", ".join(
        f"{name} {check['value']:.3f} ({'holds' if check['holds'] else 'FAILS'})"
        for name, check in found["checks"].items()
    )
    print(f"seed {seed}, {sum(found['seconds'].values()):.0f} s: {verdicts}", flush=True)


if __name__ == "__main__":
    main()
