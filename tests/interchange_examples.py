"""Small models with random parameters and a tokenizer, for the tests of what goes in and out."""

import functools

import jax
from examples import random_params

from instar.data.chat import ChatTemplate
from instar.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from instar.families import deepseek_v3, gpt3, llama, mistral, mixtral, qwen3
from instar.interchange.card import ModelCard
from instar.interchange.model import Model
from instar.models.language_model import LanguageModel
from instar.models.rotary import Rotary, Yarn
from instar.sharding.mesh import MeshConfig, make_mesh

TEXTS = [
    "A fisherman lived by the sea, with his wife.",
    "hello  world\n\nTabs\tand   spaces ",
    "naïve café, 你好，世界 😀 12345",
    "def f(x):\n    return x + 1\n",
]
VOCAB = 420


@functools.cache
def tokenizer() -> Tokenizer:
    """A SentencePiece tokenizer with chat tokens, trained on next to nothing."""
    return train_tokenizer(TEXTS * 20, TokenizerConfig(vocab_size=340, reserved=4))


_SIZES = {
    "depth": 3,
    "width": 22,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 10,
    "mlp_width": 29,
    "vocab_size": VOCAB,
    "max_positions": 128,
}
SPECS = {
    "gpt3": gpt3.gpt3(
        depth=3, width=24, heads=4, mlp_width=33, vocab_size=VOCAB, max_positions=128
    ),
    "llama": llama.llama(**_SIZES | {"width": 24}),
    "llama, of an odd width": llama.llama(**_SIZES, tied=True),
    "mistral": mistral.mistral(**_SIZES, window=5),
    "mixtral": mixtral.mixtral(**_SIZES | {"width": 24, "mlp_width": 28}, experts=3, window=5),
    "deepseek_v3": deepseek_v3.deepseek_v3(
        **{name: size for name, size in _SIZES.items() if name != "kv_heads"} | {"width": 24},
        rotary_dim=4,
        value_dim=7,
        rank=9,
        query_rank=8,
        rotary=Rotary(
            100.0, style="interleaved", scaling=Yarn(4.0, 32, mscale=1.0, mscale_all_dim=0.5)
        ),
        experts=4,
        experts_per_token=2,
        expert_width=8,
        groups=2,
        top_groups=1,
        scale=2.5,
    ),
    "qwen3": qwen3.qwen3(**_SIZES, tied=True),
}


def make_model(name: str, seed: int = 0) -> Model:
    """A model with one of `SPECS`; its vocabulary is larger than the tokenizer's."""
    spec = SPECS[name]
    card = ModelCard(
        spec,
        tokenizer(),
        ChatTemplate.named("chatml").source,
        (tokenizer().eos_id,),
    )
    model = LanguageModel(spec)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    # Smaller than elsewhere, so that rounding is not magnified from layer to layer.
    params = jax.tree.map(lambda leaf: 0.6 * leaf, random_params(model, seed))
    return Model(card, model, params, mesh)
