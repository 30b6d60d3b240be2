"""The train step: one compiled program from (state, frozen, inputs) to (state, metrics)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from instar.training.optimizer import Schedule, clip_by_norm
from instar.training.state import TrainState, step_key

# (params, frozen, microbatch, key) -> (sum of the loss over targets, sums to report). The sums
# hold `weight`, by which the loss and its gradient are divided once the whole batch is summed,
# `tokens` where the weight does not count those that were trained on, and `counts`, a tree, where
# `settle` is told something of the batch that is no mean.
LossSums = Callable[[dict, object, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
# (new parameters, counts of the whole batch) -> (parameters, scalars to report): what a step does
# besides following a gradient.
Settle = Callable[[dict, dict], tuple[dict, dict[str, jax.Array]]]
Step = Callable[[TrainState, object, dict], tuple[TrainState, dict[str, jax.Array]]]


def accumulate(
    loss_sums: LossSums, params: dict, frozen: object, inputs: dict, key: jax.Array
) -> tuple[dict, dict[str, jax.Array]]:
    """Gradients and sums over all microbatches, in float32.

    `inputs` holds arrays (or trees of them) [M, ...] of microbatches, and `microbatches` (int32),
    how many of the M are real. That count is traced, so a growing batch does not compile again;
    summing before dividing makes the result that of one large batch.
    """
    count = inputs["microbatches"]
    batches = {name: value for name, value in inputs.items() if name != "microbatches"}
    differentiate = jax.grad(loss_sums, has_aux=True)

    def one(index: jax.Array) -> tuple[dict, dict[str, jax.Array]]:
        batch = jax.tree.map(lambda x: x[index], batches)
        return differentiate(params, frozen, batch, jax.random.fold_in(key, index))

    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return one(0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, 0))
    return jax.lax.fori_loop(0, count, lambda i, total: jax.tree.map(jnp.add, total, one(i)), zeros)


def compile_step(step: Step, template: TrainState) -> Step:
    """`step` as one compiled program that reuses the memory of the state it is given.

    The new state is laid out exactly as `template` is, so that a run compiles once.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_step(
    loss_sums: LossSums,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    learning_rate: float,
    clip_norm: float | None,
    settle: Settle = lambda params, counts: (params, {}),
) -> Step:
    """The pure step; `compile_step` makes it one program.

    `learning_rate` is the peak that `optimizer` was made for; it is only reported.

    A step whose loss or gradient is not finite changes nothing but the step count, and reports
    `skipped` = 1: the decision is taken on the device, since metrics reach the host late.
    """

    def step(state: TrainState, frozen: object, inputs: dict) -> tuple[TrainState, dict]:
        key = step_key(state)
        grads, sums = accumulate(loss_sums, state.params, frozen, inputs, key)
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        share = schedule(state.step)
        updates, opt_state = optimizer.update(
            clip_by_norm(grads, norm, clip_norm), state.opt_state, state.params
        )
        updates = jax.tree.map(lambda u: (u * share).astype(u.dtype), updates)
        params = optax.apply_updates(state.params, updates)
        params, settled = settle(params, sums.pop("counts", {}))
        tokens = sums.pop("tokens", sums["weight"])
        means = {name: value / weight for name, value in sums.items() if name != "weight"}
        finite = jnp.isfinite(norm) & jnp.isfinite(means["loss"])

        def keep(new: dict, old: dict) -> dict:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        metrics = means | {
            **settled,
            "tokens": tokens,
            "grad_norm": norm,
            "learning_rate": learning_rate * share,
            "skipped": 1.0 - finite,
        }
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        return state, metrics

    return step
