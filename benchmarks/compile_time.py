"""How long the train step takes to compile as the model gets deeper: with a scan, not longer.

python benchmarks/compile_time.py [--json benchmarks/results/compile_time.json]
"""

import argparse
import json
import pathlib
import time

import jax

from instar.families.registry import ModelConfig, build_spec
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums
from instar.training.optimizer import OptimizerConfig, ScheduleConfig, make_optimizer, make_schedule
from instar.training.state import make_initializer
from instar.training.step import make_step

DEPTHS, UNROLLED = (2, 6, 12, 24, 48, 96), (2, 6, 12)
ROWS, SEQUENCE, VOCABULARY = 4, 128, 4096


def compile_seconds(depth: int, unroll: int) -> float:
    """Seconds from the Python function to the compiled program, for a LLaMA of `depth` layers."""
    config = ModelConfig("llama", depth=depth, width=128, heads=4, mlp_width=352)
    spec = build_spec(config, vocab_size=VOCABULARY, max_positions=SEQUENCE)
    model = LanguageModel(spec, Execution(remat="full", unroll=unroll))
    optimizer = make_optimizer(OptimizerConfig(), model.axes)

    def loss_sums(params: dict, frozen: None, batch: dict, key: jax.Array) -> tuple:
        hidden, _ = model.apply(params, batch["tokens"])
        sums = next_token_sums(hidden, model.head(params), batch["targets"], batch["weights"])
        return sums["nats"], {"loss": sums["nats"], "weight": sums["weight"]}

    schedule = make_schedule(ScheduleConfig("constant"), 1)
    step = make_step(loss_sums, optimizer, schedule, learning_rate=1.0, clip_norm=1.0)
    initialize = make_initializer(model, optimizer, Initialization())
    state = jax.eval_shape(initialize, jax.random.key(0))
    row = jax.ShapeDtypeStruct((1, ROWS, SEQUENCE), "int32")
    weights = jax.ShapeDtypeStruct(row.shape, "float32")
    count = jax.ShapeDtypeStruct((), "int32")
    batch = {"tokens": row, "targets": row, "weights": weights, "microbatches": count}
    started = time.perf_counter()
    jax.jit(step, donate_argnums=0).lower(state, None, batch).compile()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/compile_time.json")
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    arguments = parser.parse_args()
    depths = arguments.depths
    compile_seconds(2, 1)  # what is imported and set up once
    print(f"{'layers':>8}{'scan':>10}{'unrolled':>10}  seconds")
    scanned, unrolled = {}, {}
    for depth in depths:
        scanned[depth] = compile_seconds(depth, 1)
        unrolled[depth] = compile_seconds(depth, 0) if depth in UNROLLED else None
        shown = f"{unrolled[depth]:10.1f}" if unrolled[depth] else f"{'':10}"
        print(f"{depth:8}{scanned[depth]:10.1f}{shown}", flush=True)
    ratio = scanned[depths[-1]] / scanned[depths[0]]
    print(f"{depths[-1]} layers take {ratio:.2f} times as long as {depths[0]}")
    result = {"jax": jax.__version__, "scan": scanned, "unrolled": unrolled, "ratio": ratio}
    path = pathlib.Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
