"""Transformers and Instar read each other's reward models, and give the same scores."""

from pathlib import Path

import jax
import numpy as np
import pytest
from examples import random_params
from interchange_examples import SPECS, make_model
from test_interchange import CASES, randomised

import instar
from instar.interchange.card import ModelCard
from instar.interchange.convert import (
    ExportOptions,
    ImportOptions,
    export_model,
    import_model,
    write_hub_folder,
)
from instar.interchange.parameters import flatten
from instar.models.reward_model import RewardModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

PAD, LENGTHS = 1, np.asarray([3, 17, 9, 1])
NAMES = (
    "opt-350m",
    "bloom",
    "falcon-40b",
    "gpt-neox",
    "gpt-j",
    "gpt-neo",
    "qwen2",
    "qwen3 with experts",
    "deepseek-v3",
    "gemma2",
    "gemma3",
    "olmo2",
    "glm",
    "glm4",
    "gpt2",
    "llama, tied, with biases",
    "mistral",
    "mixtral with a window",
    "qwen3",
)


def texts(vocabulary: int) -> np.ndarray:
    """Rows of unequal lengths, with padding behind them; a text may hold the padding too."""
    tokens = np.random.default_rng(0).integers(2, vocabulary, (len(LENGTHS), LENGTHS.max()))
    tokens[1, 4] = PAD
    return np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], tokens, PAD)


def theirs(model, tokens: np.ndarray) -> np.ndarray:
    mask = torch.asarray(np.arange(tokens.shape[1]) < LENGTHS[:, None]).long()
    with torch.no_grad():
        return model(torch.asarray(tokens), attention_mask=mask).logits[:, 0].numpy()


def ours(folder: Path, tokens: np.ndarray) -> np.ndarray:
    judge = instar.load(folder)
    return np.asarray(jax.jit(judge.model.scores)(judge.params, tokens, LENGTHS))[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_classifier_of_transformers_gives_the_same_scores_and_comes_back(name, tmp_path):
    family, options = CASES[name]
    config = getattr(transformers, f"{family}Config")(
        **options | {"num_labels": 1, "pad_token_id": PAD}
    )
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    model = randomised(kind._from_config(config, attn_implementation="eager"))
    model.save_pretrained(tmp_path / "theirs")
    tokens = texts(config.vocab_size)
    expected = theirs(model, tokens)
    np.testing.assert_allclose(ours(tmp_path / "theirs", tokens), expected, atol=2e-4)
    assert np.ptp(expected) > 0.1

    import_model(ImportOptions(from_=str(tmp_path / "theirs"), to=str(tmp_path / "ours")))
    export_model(ExportOptions(checkpoint=str(tmp_path / "ours"), to=str(tmp_path / "back")))
    automatic = transformers.AutoModelForSequenceClassification
    again = automatic.from_pretrained(
        tmp_path / "back", attn_implementation="eager", pad_token_id=PAD
    ).eval()
    assert type(again) is kind
    for tensor, back in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, back)
    assert theirs(again, tokens).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", SPECS)
def test_a_reward_model_of_ours_in_transformers(name, tmp_path):
    """Its bias is in the config, and its padding the tokenizer's."""
    model, known = RewardModel(SPECS[name]), make_model(name).card
    params = random_params(model.model, 1)
    card = ModelCard(model.spec, known.tokenizer, known.chat_template, known.stop_ids, members=1)
    read = flatten(params).__getitem__
    write_hub_folder(card, lambda path: np.asarray(read(path)), tmp_path, np.dtype("f4"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = np.where(texts(340) == PAD, known.tokenizer.pad_id, texts(340))
    assert again.config.score_bias == float(params["score_head"]["bias"][0])
    scores = theirs(again, tokens) + again.config.score_bias
    np.testing.assert_allclose(ours(tmp_path, tokens), scores, atol=2e-4)
    judge, tokenizer = instar.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a wife"}]
    rendered = tokenizer.apply_chat_template(messages)
    ids = getattr(rendered, "input_ids", rendered)
    whole = judge.encoder.whole("hello", "a wife")
    # What a template writes behind the end token is no part of the text.
    assert ids[: len(whole)] == whole and len(ids) - len(whole) <= 1
