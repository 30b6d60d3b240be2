"""Tokens a second, MFU and memory of training on this machine's accelerators, and how to have most.

    python benchmarks/mfu.py --hardware h100-1 [--json benchmarks/results/mfu.json]

MFU is model FLOP (causal attention counted half, nothing that is computed again) over the chips'
dense bf16 peak; beside it stands the share of what a matrix product reaches on the same chip. Rows
of 4,096 tokens. For each model rows a device, rematerialisation and attention backend are tried one
after the other, each with the best of what was tried before, every try in a process of its own, so
that one may run out of memory. Generation and an iteration of PPO are timed on one device.
"""

import argparse
import json
import pathlib
import subprocess
import sys

LENGTH = 4096
ONE_BILLION = {"family": "llama", "depth": 16, "width": 2048, "heads": 16, "kv_heads": 8}
ONE_BILLION |= {"mlp_width": 8192, "vocab_size": 32_000}
MODELS = {
    "GPT 125M": {"family": "gpt3", "size": "125m", "vocab_size": 50_304},
    "LLaMA 1B": ONE_BILLION,
    "LLaMA 3B": ONE_BILLION | {"depth": 28, "width": 3072, "heads": 24, "vocab_size": 128_256},
    "LLaMA 8B": ONE_BILLION
    | {"depth": 32, "width": 4096, "heads": 32, "mlp_width": 14_336, "vocab_size": 128_256},
}
SMALL = {"family": "llama", "depth": 2, "width": 64, "heads": 4, "vocab_size": 512}
# What is tried, and where the search begins.
SEARCH = {
    "rows": (1, 2, 4, 8, 16),
    "remat": ("attention", "full", "dots", "none"),
    "attention": ("auto", "xla"),
}
SMALL_SEARCH = {"rows": (1, 2), "remat": ("attention",), "attention": ("auto", "xla")}


def run(job: dict) -> dict:
    """What a worker measured, or {"failed": why}."""
    script = pathlib.Path(__file__).with_name("_mfu_worker.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    full = any("RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower() for line in said)
    return {"failed": "out of memory" if full else said[-1]}


def search(job: dict, choices: dict[str, tuple]) -> list[dict]:
    """Each try as its settings and what came of it: one setting at a time, from the best so far."""
    tries: list[dict] = []
    chosen = {name: values[0] for name, values in choices.items()}

    def measured(settings: dict) -> float:
        for each in tries:
            if {name: each[name] for name in choices} == settings:
                return each.get("tokens_per_second", 0.0)
        found = run(job | settings)
        tries.append(settings | found)
        print("  ", told(tries[-1]), flush=True)
        return found.get("tokens_per_second", 0.0)

    for name, values in choices.items():
        speed: dict = {}
        for value in values:
            speed[value] = measured(chosen | {name: value})
            # More rows than there is room for are not tried with still more.
            if name == "rows" and not speed[value]:
                break
        chosen[name] = max(speed, key=speed.__getitem__)
    return tries


def told(found: dict) -> str:
    """A try in a line."""
    settings = f"{found['rows']:3} rows  {found['remat']:10}{found['attention']:6}"
    if "failed" in found:
        return f"{settings}  {found['failed']}"
    reached = found["flops_per_token"] * found["tokens_per_second"]
    memory = (found["peak_bytes"] or found["compiled_bytes"]) / 1e9
    mfu = f"MFU {reached / found['peak']:.1%}" if found["peak"] else "no published peak"
    return (
        f"{settings}{found['tokens_per_second']:12,.0f} tok/s  {mfu}  "
        f"{reached / found['matmul_peak']:.1%} of the measured product  {memory:.1f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/mfu.json")
    parser.add_argument("--hardware", default="cpu", help="a preset of instar.stages.presets")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=10, help="of each of three turns")
    parser.add_argument("--small", action="store_true", help="one tiny model, for a test")
    arguments = parser.parse_args()
    small, cpu = arguments.small, arguments.hardware == "cpu"
    models = {"small": SMALL} if small else {name: MODELS[name] for name in arguments.models}
    length = 64 if small else LENGTH
    choices = SMALL_SEARCH if small else SEARCH
    job = {"kind": "train", "hardware": arguments.hardware, "length": length}
    job |= {"steps": arguments.steps, "loss_chunk": length // 8}
    training = {}
    for name, model in models.items():
        print(name, flush=True)
        training[name] = search(job | {"model": model}, choices)

    one = SMALL if small else ONE_BILLION
    prompt, new, rows = (8, 8, 4) if small else (512, 128, 64)
    job = {"hardware": arguments.hardware, "prompt": prompt, "new": new, "rows": rows}
    job |= {"dtype": "float32" if cpu else "bfloat16", "model": one}
    generation = {}
    for rows in {job["rows"]} if small else (1, job["rows"]):
        generation[rows] = run(job | {"kind": "generate", "rows": rows})
        speed = generation[rows].get("tokens_per_second")
        told_speed = f"{speed:,.0f} tok/s" if speed else generation[rows]["failed"]
        print(f"generation, {rows} rows of {prompt} + {new} tokens: {told_speed}", flush=True)

    # A vocabulary of 4,096, for which a tokenizer is trained in a moment.
    shape = {key: value for key, value in one.items() if key != "family"}
    shape["vocab_size"] = 320 if small else 4096
    iteration = {"kind": "ppo", "shape": shape, "epochs": 1, "minibatch": job["rows"] // 2}
    iteration |= {"remat": "attention", "unroll": 1}
    found = run(job | iteration)
    seconds = found.get("seconds")
    print(f"PPO, {job['rows']} responses: {f'{seconds:.2f} s' if seconds else found['failed']}")

    results = {"length": length, "training": training, "generation": generation, "ppo": found}
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
