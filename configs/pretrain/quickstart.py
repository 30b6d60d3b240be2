"""A small LLaMA on film reviews, on two CPU cores.

    instar pretrain --config configs/pretrain/quickstart.py --workdir runs/quickstart/pretrain

Two cores of an Intel Xeon that others use too: three and a half minutes, 10,000 tokens/s. Result
after 1.84 million tokens: 1.817 bits a held-out byte (after 3.07 million, with 1500 steps: 1.749).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            data=dict(path="runs/quickstart/data", sequence_length=64),
            model=dict(
                family="llama", depth=4, width=128, heads=4, mlp_width=352, tied=True, qk_norm=True
            ),
            batch=dict(size=32),
            steps=900,
            optimizer=dict(
                name="muon", muon_learning_rate=0.02, learning_rate=1.2e-2, weight_decay=0.0
            ),
            schedule=dict(kind="linear", warmup_steps=50, final_fraction=0.0),
            # Two cores gain nothing from a loop in the compiled program.
            execution=dict(unroll=0),
            checkpoint=dict(minutes=1.0),
            evaluation=dict(
                every=450,
                prompts=("The film", "I have seen", "This movie is", "The acting"),
                sampling=dict(max_new_tokens=60, temperature=0.8, top_p=0.95),
            ),
        )
    )
