"""One framework's train step in a process of its own, run a few steps at a time on request.

    python benchmarks/_step_workers.py '{"framework": "instar", "shape": {...}, ...}'

Prints {"ready": ...} once its step is compiled and warm. Then each line of standard input, a number
of steps, is answered by {"seconds": ..., "loss": ...}: so that the caller can take turns between
frameworks, and what else goes on in the machine strikes all of them alike.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

WARM_UP = 2
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
Run = Callable[[int], float]  # takes a number of steps, returns the loss of the last


def make_batch(job: dict) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, int [B, S], the same for all frameworks."""
    shape = job["shape"]
    size = (job["batch"], shape["sequence_length"] + 1)
    rows = np.random.default_rng(0).integers(0, shape["vocab_size"], size)
    return rows[:, :-1], rows[:, 1:]


def make_instar(job: dict) -> tuple[Run, dict]:
    """Instar's own step on one device; writes its initial parameters where the job says so."""
    import jax
    import jax.numpy as jnp

    from instar.families.registry import ModelConfig, build_spec
    from instar.models.language_model import LanguageModel
    from instar.models.parameters import Initialization
    from instar.models.transformer import Execution
    from instar.objectives.language import next_token_sums
    from instar.training.flops import parameter_count, train_flops_per_token
    from instar.training.hardware import measure_matmul_peak
    from instar.training.optimizer import (
        OptimizerConfig,
        ScheduleConfig,
        make_optimizer,
        make_schedule,
    )
    from instar.training.state import make_initializer
    from instar.training.step import make_step

    shape = dict(job["shape"])
    vocab_size, length = shape.pop("vocab_size"), shape.pop("sequence_length")
    config = ModelConfig(**shape, tied=True)
    spec = build_spec(config, vocab_size=vocab_size, max_positions=length)
    model = LanguageModel(spec, Execution(jnp.dtype(job["dtype"]), unroll=job.get("unroll", 0)))
    optimizer = make_optimizer(
        OptimizerConfig(
            job.get("optimizer", "adamw"),
            LEARNING_RATE,
            b2=0.95,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP,
        ),
        model.axes,
    )

    def loss_sums(params: dict, frozen: None, batch: dict, key: jax.Array) -> tuple:
        names = ("positions", "segment_ids")
        hidden, _ = model.apply(params, batch["tokens"], **{name: batch[name] for name in names})
        head = model.head(params)
        sums = next_token_sums(hidden, head, batch["targets"], batch["weights"])
        return sums["nats"], {"loss": sums["nats"], "weight": sums["weight"]}

    step = make_step(
        loss_sums,
        optimizer,
        make_schedule(ScheduleConfig("constant"), 1),
        learning_rate=LEARNING_RATE,
        clip_norm=CLIP,
    )
    step = jax.jit(step, donate_argnums=0)
    state = jax.jit(make_initializer(model, optimizer, Initialization()))(jax.random.key(0))
    if "parameters" in job:
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
        named = {"/".join(key.key for key in path): leaf for path, leaf in leaves}
        np.savez(job["parameters"], **named)
    tokens, targets = (jnp.asarray(x, jnp.int32)[None] for x in make_batch(job))
    batch = {
        "tokens": tokens,
        "targets": targets,
        "weights": jnp.ones(tokens.shape, jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "segment_ids": jnp.ones_like(tokens),
        "microbatches": jnp.int32(1),
    }

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, None, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    facts = {
        "version": jax.__version__,
        "parameters": parameter_count(spec).total,
        "flops_per_token": train_flops_per_token(spec, length),
        "matmul_peak": measure_matmul_peak(jnp.dtype(job["dtype"])),
    }
    return run, facts


def make_torch(job: dict, compiled: bool) -> tuple[Run, dict]:
    """The same step in PyTorch: AdamW in its fused form, bfloat16 by autocast."""
    import torch
    from _torch_models import Shape, Transformer, load_instar

    torch.set_num_threads(job["threads"])
    model = Transformer(Shape(**job["shape"]))
    load_instar(model, np.load(job["parameters"]))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    tokens, targets = (torch.from_numpy(x) for x in make_batch(job))
    narrow = job["dtype"] == "bfloat16"
    loss_of = torch.compile(model) if compiled else model

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = loss_of(tokens, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
            optimizer.step()
        return loss.item()

    return run, {"version": torch.__version__, "parameters": sum(p.numel() for p in parameters)}


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["framework"] == "instar":
        run, facts = make_instar(job)
    else:
        run, facts = make_torch(job, compiled=job["framework"] == "torch.compile")
    started = time.perf_counter()
    losses = [run(1) for _ in range(WARM_UP)]
    seconds = time.perf_counter() - started
    print(json.dumps({"ready": facts | {"losses": losses, "warm_up_seconds": seconds}}), flush=True)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        started, busy = time.perf_counter(), time.process_time()
        loss = run(steps)
        answer = {
            "seconds": (time.perf_counter() - started) / steps,
            "cpu_seconds": (time.process_time() - busy) / steps,
            "loss": loss,
        }
        print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
