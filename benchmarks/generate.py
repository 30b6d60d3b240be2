"""Prefill and decode against transformers' `generate` and llama.cpp, and against the memory.

    python benchmarks/generate.py [--json benchmarks/results/generate.json] [--gguf FILE]

Needs PyTorch and transformers (the extra `parity`), and llama-cpp-python for `--gguf`. The model is
SmolLM2-135M's shape with random weights, the same for all but llama.cpp. Each program runs in a
process of its own with the same number of threads; they take turns of one greedy batch, so that
what else goes on in the machine strikes all alike, and the fastest turn of each counts. A decoded
token of one row needs each weight once: the share is that of the bandwidth measured in between.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile

from _workers import Worker

SCRIPT = "_generate_workers.py"
SHAPES = {
    "smollm2-135m": {
        "depth": 30,
        "width": 576,
        "heads": 9,
        "kv_heads": 3,
        "mlp_width": 1536,
        "vocab_size": 49152,
        "max_positions": 8192,
    },
    "small": {
        "depth": 2,
        "width": 48,
        "heads": 3,
        "kv_heads": 1,
        "mlp_width": 64,
        "vocab_size": 320,
        "max_positions": 256,
    },
}


def measure(workers: dict[str, Worker], rows: int, prompt: int, new: int, turns: int) -> dict:
    """Tokens a second of each program, in reading the prompts and in going on from them.

    Reading is timed with the first new token, which is taken off the time of the others.
    """
    reading: dict[str, list[float]] = {name: [] for name in workers}
    whole: dict[str, list[float]] = {name: [] for name in workers}
    tokens = {}
    for turn in range(turns + 1):
        for name, worker in workers.items():
            first = worker.ask(rows=rows, prompt=prompt, new=1)
            answer = worker.ask(rows=rows, prompt=prompt, new=new)
            tokens[name] = answer["tokens"]
            if turn:  # the first one compiles
                reading[name].append(first["seconds"])
                whole[name].append(answer["seconds"])
    results = {}
    for name in workers:
        seconds = min(whole[name]) - min(reading[name])
        results[name] = {
            "prefill_tokens_per_second": rows * prompt / min(reading[name]),
            "decode_tokens_per_second": rows * (new - 1) / seconds,
            "seconds_per_step": seconds / (new - 1),
        }
    compare(tokens)
    return results


def compare(tokens: dict[str, list[list[int]]]) -> None:
    """Ends the run where the two in float32 do not begin alike: it would compare two models."""
    ours, theirs = tokens.get("instar float32"), tokens.get("transformers float32")
    if ours and theirs and [row[0] for row in ours] != [row[0] for row in theirs]:
        sys.exit("the first tokens differ, so the models are not the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/generate.json")
    parser.add_argument("--model", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--gguf", help="run llama.cpp on this file as well")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = [f"instar {dtype}" for dtype in arguments.dtypes] + ["transformers float32"]
    if arguments.gguf:
        names.append("llama.cpp")
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        job = {"shape": SHAPES[arguments.model], "threads": threads, "gguf": arguments.gguf}
        job["weights"] = f"{folder}/weights"
        # Instar first: it writes the weights from which the others start.
        workers = {
            name: Worker(SCRIPT, job | {"program": name, "dtype": name.split()[-1]})
            for name in names
        }
        bandwidth = workers[names[0]].ask(read=True)["bytes_per_second"]
        for rows in arguments.rows:
            measured[f"{rows} rows"] = measure(
                workers, rows, arguments.prompt, arguments.new, arguments.turns
            )
            again = workers[names[0]].ask(read=True)["bytes_per_second"]
            bandwidth = max(bandwidth, again)
        for worker in workers.values():
            worker.close()
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':10}{'':22}{'prefill':>10}{'decode':>10}  tokens/s{'of memory':>12}")
    for batch, results in measured.items():
        for name, result in results.items():
            weights = workers[name].ready.get("weight_bytes")
            if weights is not None:
                result["weight_bytes"] = weights
                result["share_of_bandwidth"] = weights / result["seconds_per_step"] / bandwidth
            share = f"{result['share_of_bandwidth']:.0%}" if weights is not None else ""
            print(
                f"{batch:10}{name:22}{result['prefill_tokens_per_second']:10.0f}"
                f"{result['decode_tokens_per_second']:10.1f}{'':10}{share:>12}"
            )
    header = {
        "model": arguments.model,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "threads": threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "bytes_per_second": bandwidth,
        "versions": {name: worker.ready["version"] for name, worker in workers.items()},
    }
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header | {"measured": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
