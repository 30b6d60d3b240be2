"""What the loss needs in memory: the whole logits against chunks over tokens.

    python benchmarks/loss_memory.py [--json benchmarks/results/loss_memory.json]

Memory is that of the compiled program of the loss and its gradient, without arguments and results;
time is the fastest of a few runs, in turns.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp

from instar.objectives.language import next_token_sums

ROWS, SEQUENCE, WIDTH = 2, 1024, 256
VOCABULARIES, CHUNKS, TURNS = (32_000, 128_000), (0, 256, 64), 3


def make_program(vocabulary: int, chunk: int) -> tuple[jax.stages.Compiled, tuple]:
    """The compiled loss and gradient, and arguments for it."""

    def loss(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        weights = jnp.ones(targets.shape, jnp.float32)
        return next_token_sums(hidden, lambda h: h @ kernel, targets, weights, chunk)["nats"]

    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (
        jax.random.normal(keys[0], (ROWS, SEQUENCE, WIDTH)),
        0.02 * jax.random.normal(keys[1], (WIDTH, vocabulary)),
        jax.random.randint(keys[2], (ROWS, SEQUENCE), 0, vocabulary),
    )
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile(), arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/loss_memory.json")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES))
    arguments = parser.parse_args()
    print(f"{'vocabulary':>10}{'chunk':>8}{'MiB':>10}{'share':>8}{'seconds':>10}{'share':>8}")
    measured = []
    for vocabulary in arguments.vocabularies:
        programs = {chunk: make_program(vocabulary, chunk) for chunk in CHUNKS}
        seconds = {chunk: [] for chunk in CHUNKS}
        for _ in range(TURNS):
            for chunk, (compiled, inputs) in programs.items():
                started = time.perf_counter()
                jax.block_until_ready(compiled(*inputs))
                seconds[chunk].append(time.perf_counter() - started)
        memory = {c: p.memory_analysis().temp_size_in_bytes for c, (p, _) in programs.items()}
        for chunk in CHUNKS:
            result = {
                "vocabulary": vocabulary,
                "chunk": chunk or SEQUENCE,
                "bytes": memory[chunk],
                "share_of_bytes": memory[chunk] / memory[0],
                "seconds": min(seconds[chunk]),
                "share_of_seconds": min(seconds[chunk]) / min(seconds[0]),
            }
            measured.append(result)
            print(
                f"{vocabulary:10,}{result['chunk']:8,}{memory[chunk] / 2**20:10,.0f}"
                f"{result['share_of_bytes']:8.1%}{result['seconds']:10.2f}"
                f"{result['share_of_seconds']:8.1%}",
                flush=True,
            )
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"rows": ROWS, "sequence": SEQUENCE, "width": WIDTH, "jax": jax.__version__}
    path.write_text(json.dumps(shape | {"measured": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
