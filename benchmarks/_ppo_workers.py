"""One system's PPO in a process of its own, run an iteration at a time on request.

    python benchmarks/_ppo_workers.py '{"system": "instar", "shape": {...}, ...}'

Prints {"ready": ...} once it is warm. Then each line of standard input is answered by the seconds
of an iteration, by the clock and of the processor: {"apart": false} by those of one as it is,
{"apart": true} by those of one whose phases wait for one another, and those of each phase.
"""

import collections
import json
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import TextIO

import numpy as np

WARM_UP = 2
# TRL's settings, and for Instar those that are the same.
LEARNING_RATE, BETA, CLIP, VALUE_COEFFICIENT, LAM = 3e-6, 0.05, 0.2, 0.1, 0.95
HEADS = "heads.npz"
Run = Callable[[bool], dict]  # whether the phases are timed -> seconds of an iteration


class Clock:
    """Adds up the seconds of the phases of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def time(self, phase: str, call: Callable, wait: Callable = lambda result: None) -> Callable:
        """`call`, whose time counts to `phase`; `wait` is for its result."""

        def timed(*arguments: object, **named: object) -> object:
            started = time.perf_counter()
            result = call(*arguments, **named)
            wait(result)
            self.seconds[phase] += time.perf_counter() - started
            return result

        return timed


def make_prompts(job: dict) -> np.ndarray:
    """int [B, P], ids above those of the special tokens, the same for both."""
    size = (job["rows"], job["prompt"])
    return np.random.default_rng(0).integers(8, job["shape"]["vocab_size"], size)


def make_whole(job: dict) -> np.ndarray:
    """int [8, P + T], on which both must agree before anything is timed."""
    size = (8, job["prompt"] + job["new"])
    return np.random.default_rng(1).integers(8, job["shape"]["vocab_size"], size)


# --- Instar -------------------------------------------------------------------------------------


def make_tokenizer(vocab_size: int) -> object:
    """A tokenizer of that size, trained on words that mean nothing."""
    from instar.data.tokenizer import TokenizerConfig, train_tokenizer

    rng = np.random.default_rng(2)
    syllables = [f"{first}{second}" for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = ["".join(rng.choice(syllables, 3)) for _ in range(2 * vocab_size)]
    texts = [" ".join(rng.choice(words, 20)) for _ in range(vocab_size)]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=vocab_size))


def make_instar(job: dict) -> tuple[Run, dict]:
    """The iteration of Instar's stage; writes the weights where the job says so, for another."""
    import functools

    import jax
    import jax.numpy as jnp

    from instar.families.llama import llama
    from instar.interchange.card import ModelCard
    from instar.interchange.convert import write_hub_folder
    from instar.interchange.parameters import flatten
    from instar.models.language_model import LanguageModel
    from instar.models.reward_model import RewardModel
    from instar.objectives.language import token_log_probs
    from instar.reinforcement.config import UpdateConfig
    from instar.reinforcement.experience import Networks
    from instar.reinforcement.roles import role_shardings
    from instar.reinforcement.update import make_improve
    from instar.sharding.inputs import place_rows
    from instar.sharding.mesh import make_mesh
    from instar.stages import ppo_config
    from instar.stages.config import LanguageExecutionConfig
    from instar.stages.ppo_iteration import Iteration, Player
    from instar.stages.ppo_state import make_learners, make_state, make_template
    from instar.stages.run import make_execution
    from instar.training.batch import BatchConfig
    from instar.training.flops import forward_flops_per_token, parameter_count
    from instar.training.hardware import measure_matmul_peak
    from instar.training.optimizer import OptimizerConfig, ScheduleConfig

    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0, clip_norm=None)
    constant = ScheduleConfig("constant")
    config = ppo_config.PpoConfig(
        parent="",
        prompts=ppo_config.PromptsConfig("", max_length=job["prompt"]),
        reward=ppo_config.RewardSourceConfig(model=""),
        response=ppo_config.ResponseConfig(job["new"]),
        batch=BatchConfig(job["rows"]),
        steps=1,
        update=UpdateConfig(
            beta=BETA,
            lam=LAM,
            clip=CLIP,
            value_clip=CLIP,
            value_coefficient=VALUE_COEFFICIENT,
            epochs=job["epochs"],
            minibatch=job["minibatch"],
        ),
        optimizer=optimizer,
        schedule=constant,
        critic=ppo_config.CriticConfig(optimizer=optimizer, schedule=constant),
        compute_dtype=job.get("dtype", "float32"),
        execution=LanguageExecutionConfig(job.get("remat", "none"), job.get("unroll", 0)),
    )
    mesh = make_mesh(config.mesh)
    execution = make_execution(config, mesh)
    tokenizer = make_tokenizer(job["shape"]["vocab_size"])
    spec = llama(**job["shape"], tied=True, norm_epsilon=1e-5)
    policy, judge = LanguageModel(spec, execution), RewardModel(spec, 1, execution)
    networks = Networks(policy=policy, critic=judge.model, reference=policy, reward=judge)

    params = jax.jit(policy.init)(jax.random.key(0))
    critic, reward = (judge.from_language(params, jax.random.key(seed)) for seed in (1, 2))
    card = ModelCard(spec, tokenizer, stop_ids=(tokenizer.eos_id,))
    if "weights" in job:
        folder = pathlib.Path(job["weights"])
        read = flatten(jax.device_get(params)).__getitem__
        write_hub_folder(card, read, folder, np.dtype(np.float32))
        heads = {"critic": critic, "reward": reward}
        heads = {n: judge.member(tree, 0)["score_head"]["kernel"] for n, tree in heads.items()}
        np.savez(folder / HEADS, **heads)

    whole, length = jnp.asarray(make_whole(job)), job["prompt"]
    hidden, _ = policy.apply(params, whole)
    log_probs = token_log_probs(policy.head(params)(hidden[:, length - 1 : -1]), whole[:, length:])
    scores = judge.scores(reward, whole, jnp.full(len(whole), whole.shape[1]))
    hidden, _ = judge.model.apply(judge.member(critic, 0), whole)
    values = judge.model.value_head(judge.member(critic, 0))(hidden)
    agreed = [float(jnp.mean(x)) for x in (log_probs, scores, values)]

    learners = make_learners(config, networks)
    template = make_template(config, networks, learners, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    frozen = {
        "reference": jax.tree.map(jnp.copy, params),
        "reward": jax.tree.map(jnp.copy, reward),
    }
    for role, model in (("reference", policy), ("reward", judge)):
        places = role_shardings(getattr(config.roles, role), mesh, frozen[role], model.axes)
        frozen[role] = jax.device_put(frozen[role], places)
    make = functools.partial(make_state, config, learners)
    critic = jax.tree.map(jnp.copy, judge.member(critic, 0))
    state = jax.jit(make, out_shardings=shardings)(params, critic, jax.random.key(0))

    encoder = types.SimpleNamespace(tokenizer=tokenizer)  # of which only this is used
    player = Player(config, networks, encoder, card.stop_ids, mesh, None, {})
    improve = make_improve(networks, learners, config.update, microbatch=config.microbatch)
    iteration = Iteration(player, improve, template)
    prompts = make_prompts(job).astype(np.int32)
    lengths = np.full(len(prompts), job["prompt"], np.int32)
    inputs = {
        "prompts": [tokenizer.decode(row) for row in prompts.tolist()],
        "placed": place_rows(mesh, {"tokens": prompts, "lengths": lengths}),
        "ptx": None,
    }
    clock = Clock()
    parts = (
        (player, "_rollout", "rollout"),
        (player, "_assess", "assess"),
        (player, "_texts", "texts"),
        (player, "describe", "texts"),
        (iteration, "_improve", "update"),
    )
    whole_parts = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]

    def run(apart: bool) -> dict:
        nonlocal state
        for (owner, name, part), (*_, phase) in zip(whole_parts, parts, strict=True):
            wait = jax.block_until_ready
            setattr(owner, name, clock.time(phase, part, wait) if apart else part)
        clock.seconds.clear()
        started, busy = time.perf_counter(), time.process_time()
        state, metrics = iteration(state, frozen, inputs)
        jax.device_get(metrics)  # as the loop of a run does
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - busy,
            "phases": dict(clock.seconds),
        }

    total = job["prompt"] + job["new"]
    facts = {
        "version": jax.__version__,
        "parameters": parameter_count(spec).total,
        "flops_per_token": {
            "policy": forward_flops_per_token(spec, total),
            "scalar": forward_flops_per_token(judge.spec, total),
        },
        "matmul_peak": measure_matmul_peak(),
        "agreed": agreed,
    }
    return run, facts


# --- TRL ----------------------------------------------------------------------------------------


def serve_trl(job: dict, answers: TextIO) -> None:
    """Runs TRL's trainer, which waits for an order at the end of each of its iterations.

    In float32 without recomputation, which on a CPU is the faster way, and with all responses in
    one call of `generate`, likewise.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import torch
    import transformers
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.set_num_threads(job["threads"])
    folder = pathlib.Path(job["weights"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for _ in range(2)
    )
    heads = np.load(folder / HEADS)

    def judge(name: str) -> torch.nn.Module:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        )
        with torch.no_grad():
            model.score.weight.copy_(torch.from_numpy(heads[name]).T)
        return model

    critic, reward = judge("critic"), judge("reward")
    whole, length = torch.from_numpy(make_whole(job)), job["prompt"]
    with torch.no_grad():
        logits = policy(whole).logits[:, length - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(2, whole[:, length:, None])
        scores = reward.score(reward.model(whole).last_hidden_state[:, -1])
        values = critic.score(critic.model(whole).last_hidden_state)
    agreed = [x.mean().item() for x in (log_probs, scores, values)]

    # When the iteration began, by the clock and of the processor, and when its update did.
    clock, epoch = Clock(), {"warm": 0, "started": 0.0, "busy": 0.0, "update": None}

    def timed_forward(call: Callable) -> Callable:
        """A forward pass is of the assessment, or, with gradients, of the update."""
        assessing = clock.time("assess", call)

        def forward(*arguments: object, **named: object) -> object:
            if not torch.is_grad_enabled():
                return assessing(*arguments, **named)
            epoch["update"] = epoch["update"] or time.perf_counter()
            return call(*arguments, **named)

        return forward

    ppo_trainer.batch_generation = clock.time("rollout", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = timed_forward(ppo_trainer.get_reward)
    ppo_trainer.forward = timed_forward(ppo_trainer.forward)

    class Turns(transformers.TrainerCallback):
        """Ends an iteration: answers, and waits for the next order."""

        def on_step_end(self, *arguments: object, **named: object) -> None:
            now, busy = time.perf_counter(), time.process_time()
            if epoch["warm"] < WARM_UP:
                epoch["warm"] += 1
                if epoch["warm"] == WARM_UP:
                    say(answers, ready=facts)
            else:
                phases = {**clock.seconds, "update": now - epoch["update"]}
                say(
                    answers,
                    seconds=now - epoch["started"],
                    cpu_seconds=busy - epoch["busy"],
                    phases=phases,
                )
            if epoch["warm"] == WARM_UP and not sys.stdin.readline():
                os._exit(0)
            clock.seconds.clear()
            epoch.update(started=time.perf_counter(), busy=time.process_time(), update=None)

    facts = {"version": trl.__version__, "torch": torch.__version__, "agreed": agreed}
    facts["transformers"] = transformers.__version__
    rows = job["rows"]
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        num_sample_generations=0,
        # An optimiser's step for each minibatch: with accumulation there would be fewer.
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_mini_batches=rows // job["minibatch"],
        num_ppo_epochs=job["epochs"],
        local_rollout_forward_batch_size=rows,
        total_episodes=rows * 1_000_000,
        response_length=job["new"],
        stop_token="eos",
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        kl_coef=BETA,
        cliprange=CLIP,
        cliprange_value=CLIP,
        vf_coef=VALUE_COEFFICIENT,
        lam=LAM,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=datasets.Dataset.from_dict({"input_ids": make_prompts(job).tolist()}),
        callbacks=[Turns()],
    )
    trainer.train()


# --- Both ---------------------------------------------------------------------------------------


def say(answers: TextIO, **values: object) -> None:
    print(json.dumps(values), file=answers, flush=True)


def serve_instar(job: dict, answers: TextIO) -> None:
    run, facts = make_instar(job)
    for _ in range(WARM_UP):
        run(False)
    say(answers, ready=facts)
    for line in sys.stdin:
        say(answers, **run(json.loads(line)["apart"]))
    os._exit(0)


def main() -> None:
    job = json.loads(sys.argv[1])
    # What a system prints is not an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    {"instar": serve_instar, "trl": serve_trl}[job["system"]](job, answers)


if __name__ == "__main__":
    main()
