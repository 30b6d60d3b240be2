"""One measurement of `mfu.py` in a process of its own, which may run out of memory.

    python benchmarks/_mfu_worker.py '{"kind": "train", "hardware": "cpu", "model": {...}, ...}'

The last line of its output holds what was measured, as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

WARM_UP, TURNS = 2, 3


def time_turns(run: Callable[[], object], steps: int) -> float:
    """Seconds of one call: the median of turns of `steps` calls, for the last of which we wait."""
    import jax

    for _ in range(WARM_UP):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        for _ in range(steps):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / steps)
    return statistics.median(seconds)


def describe() -> dict:
    """The devices, what their makers promise, and what a matrix product reaches on one of them."""
    import jax
    import jax.numpy as jnp

    from instar.training.hardware import CHIPS, describe_hardware, measure_matmul_peak

    hardware = describe_hardware()
    chip = CHIPS.get(hardware["device_kind"])
    dtype = jnp.float32 if hardware["platform"] == "cpu" else jnp.bfloat16
    return {
        "hardware": hardware,
        "peak": chip.flops / chip.devices * jax.device_count() if chip else None,
        "matmul_peak": measure_matmul_peak(dtype)
        * (1 if hardware["platform"] == "cpu" else jax.device_count()),
    }


def peak_memory() -> int | None:
    """Bytes of the fullest device since the process began; None where devices do not say."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((each.get("peak_bytes_in_use", 0) for each in stats), default=0) or None


def train(job: dict) -> dict:
    """Tokens a second of the train step, and the bytes that it needs on a device."""
    import jax
    from _train_step import make_train_step

    from instar.config import build
    from instar.sharding.mesh import make_mesh
    from instar.stages.pretrain import PretrainConfig
    from instar.training.flops import parameter_count, train_flops_per_token

    size = job["rows"] * jax.device_count()
    values = {
        "hardware": job["hardware"],
        "model": job["model"],
        "data": {"path": "", "sequence_length": job["length"]},
        "batch": {"size": size, "microbatch": size},
        "steps": 1_000_000,
        "execution": {
            "remat": job["remat"],
            "attention": job["attention"],
            "loss_chunk": job["loss_chunk"],
        },
    }
    config = build(values, PretrainConfig)
    made = make_train_step(config, make_mesh(config.mesh))
    # As the step itself compiles it, which asks for what is compiled already.
    memory = made.compile().memory_analysis()
    state, batch = made.state(), made.batch()

    def run() -> dict:
        nonlocal state
        state, metrics = made.step(state, None, batch)
        return metrics

    seconds = time_turns(run, job["steps"])
    return {
        "parameters": parameter_count(made.spec).total,
        "flops_per_token": train_flops_per_token(made.spec, job["length"]),
        "tokens_per_second": size * job["length"] / seconds,
        "seconds": seconds,
        "loss": float(run()["loss"]),
        "peak_bytes": peak_memory(),
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def generate(job: dict) -> dict:
    """Tokens a second of greedy generation, its prompts read once, on one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from instar.families.registry import ModelConfig, build_spec
    from instar.generation.engine import Engine
    from instar.generation.requests import Request
    from instar.generation.sampling import SamplingConfig
    from instar.generation.weights import for_decoding
    from instar.models.language_model import LanguageModel
    from instar.models.transformer import Execution

    length = job["prompt"] + job["new"]
    spec = build_spec(ModelConfig(**job["model"]), vocab_size=32_000, max_positions=length)
    dtype = jnp.dtype(job["dtype"])
    model = LanguageModel(spec, Execution(dtype))
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), model.init(key)))
    model, params = for_decoding(model, params(jax.random.key(0)))
    engine, greedy = Engine(model, max_rows=job["rows"]), SamplingConfig(job["new"], 0.0)
    size = (job["rows"], job["prompt"])
    prompts = np.random.default_rng(0).integers(0, spec.vocab_size, size).tolist()
    requests = [Request(row, greedy) for row in prompts]
    seconds = time_turns(lambda: [done.tokens for done in engine.generate(params, requests)], 1)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embedding"].nbytes
    return {
        "tokens_per_second": job["rows"] * job["new"] / seconds,
        "weight_bytes_per_second": read * job["new"] / seconds,
        "seconds": seconds,
        "peak_bytes": peak_memory(),
    }


def ppo(job: dict) -> dict:
    """Seconds of an iteration of PPO with four models of one shape, and of its phases apart."""
    from _ppo_workers import WARM_UP as ITERATIONS
    from _ppo_workers import make_instar

    run, facts = make_instar(job)
    for _ in range(ITERATIONS):
        run(False)
    whole = statistics.median(run(False)["seconds"] for _ in range(TURNS))
    phases = run(True)["phases"]
    tokens = job["rows"] * job["new"]
    return {
        "parameters": facts["parameters"],
        "seconds": whole,
        "phases": phases,
        "new_tokens_per_second": tokens / whole,
        "peak_bytes": peak_memory(),
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    from instar.stages.presets import start_hardware

    start_hardware(job["hardware"])
    if job["hardware"] == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    found = {"train": train, "generate": generate, "ppo": ppo}[job["kind"]](job)
    print(json.dumps(found | describe()), flush=True)


if __name__ == "__main__":
    main()
