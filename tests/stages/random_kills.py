"""Kills a run at random moments and compares what it comes to with a run left alone.

    python tests/stages/random_kills.py --kills 20 --seed 0

Half of the moments are spread over the whole life of the process, half over the time in which it
trains and saves, which is short on a tiny model. The tests do the same with fewer kills.
"""

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import runs

STEPS = 60
# A checkpoint every four steps, so that a kill often meets one being written.
OVERRIDES = (
    f"--config.steps={STEPS}",
    "--config.checkpoint.keep_steps=4",
    "--config.evaluation.every=30",
    "--config.logging.tensorboard=False",
)


def command(config: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    arguments = ["pretrain", "--config", str(config), "--workdir", str(workdir), *OVERRIDES]
    return [sys.executable, "-m", "instar", *arguments]


def kill_at_random(
    config: pathlib.Path, workdir: pathlib.Path, environment: dict, rng: random.Random
) -> bool:
    """Starts the run and kills it; False where it was over before."""
    log = workdir / "metrics.jsonl"
    before = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(command(config, workdir), env=environment, stderr=subprocess.DEVNULL)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.0, 8.0))
    else:
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.6))
    process.kill()
    return process.wait() != 0


def kill_and_finish(
    config: pathlib.Path, environment: dict, kills: int, seed: int, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Kills runs `kills` times in all; returns the workdirs, each run to its end afterwards."""
    rng, workdirs = random.Random(seed), [folder / "killed-0"]
    killed = 0
    while killed < kills:
        if kill_at_random(config, workdirs[-1], environment, rng):
            killed += 1
        else:
            workdirs.append(folder / f"killed-{len(workdirs)}")
    for workdir in workdirs:
        subprocess.run(command(config, workdir), env=environment, check=True)
    return workdirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = runs.write_run_config(runs.prepare_tiny_data(folder))
        environment = runs.environment()
        subprocess.run(command(config, folder / "alone"), env=environment, check=True)
        workdirs = kill_and_finish(config, environment, options.kills, options.seed, folder)
        for workdir in workdirs:
            assert runs.losses(workdir) == runs.losses(folder / "alone"), workdir
            same = runs.final_fingerprint(workdir, STEPS)
            assert same == runs.final_fingerprint(folder / "alone", STEPS), workdir
    print(f"{options.kills} kills in {len(workdirs)} runs: losses and final states are identical")


if __name__ == "__main__":
    main()
