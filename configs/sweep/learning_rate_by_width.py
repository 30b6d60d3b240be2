"""Which learning rate of AdamW suits which width: the quickstart's model, smaller and shorter.

    instar sweep --config configs/pretrain/quickstart.py \\
        --sweep configs/sweep/learning_rate_by_width.py --workdir runs/learning_rate_by_width \\
        --config.optimizer.name=adamw --config.steps=60 --config.schedule.warmup_steps=10 \\
        --config.evaluation.rows=512 --config.evaluation.prompts=[]

The quickstart's data set must be there, which `launch/local.sh quickstart` makes. Three minutes of
an Intel Xeon's time. Result, held-out loss: width 32 learns best at 6.4e-2 (6.751) and as well at
1.6e-2 (6.754), width 64 at 4e-3 (6.653): the wider, the lower.
"""

from instar import sweep


def get_sweep() -> list[sweep.Trial]:
    # Heads of 32, and a hidden layer of 11/4 of the width, as the quickstart has them.
    sizes = sweep.zip(
        {"model.width": (32, 64), "model.heads": (1, 2), "model.mlp_width": (88, 176)}
    )
    return sweep.product(sizes, {"optimizer.learning_rate": (1e-3, 4e-3, 1.6e-2, 6.4e-2)})
