"""PPO of SmolLM2-135M-Instruct on sums, whose answers a verifier checks.

The model and the prompts are made first; `task`, `size` and `seed` are those below:

    instar import --from=SmolLM2-135M-Instruct.Q4_1.gguf --to=runs/reasoning/model
    python -c "from instar.evaluation.verifiers import write_prompts as write
    write('runs/reasoning/train.jsonl', 'chain_sum', size=4000, seed=0)"
    instar ppo --config configs/ppo/reasoning_gym.py --workdir runs/reasoning/ppo
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            parent="runs/reasoning/model",
            reward=dict(
                scorer=dict(
                    function="instar.evaluation.verifiers:reasoning_gym",
                    arguments=dict(task="chain_sum", size=4000, seed=0),
                )
            ),
            prompts=dict(path="runs/reasoning/train.jsonl", max_length=96),
            response=dict(max_new_tokens=16),
            batch=dict(size=256, microbatch=32),
            steps=200,
            update=dict(
                beta=0.01,
                scores=dict(eos_replacement=-0.5),
                epochs=2,
                minibatch=64,
                target_kl=0.1,
                critic_warmup=5,
            ),
            optimizer=dict(learning_rate=3e-6, weight_decay=0.0),
            schedule=dict(kind="linear", warmup_steps=10, final_fraction=0.1),
            critic=dict(optimizer=dict(learning_rate=1e-5, weight_decay=0.0)),
        )
    )
