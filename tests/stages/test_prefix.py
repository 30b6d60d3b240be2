"""A model whose texts begin with a prefix (ChatGLM-6B), from plain texts and dialogues to PPO."""

import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import instar, losses, write_config
from tokenizer_examples import one_of_each_kind, train_chat_huggingface

from instar import cli, load
from instar.config import build
from instar.data.dataset import TokenDataset
from instar.data.prepare import PrepareConfig, prepare
from instar.data.rows import TrainingRows
from instar.data.tokenizer import load_tokenizer
from instar.families.chatglm1 import chatglm1
from instar.generation.sampling import SamplingConfig
from instar.interchange.card import ModelCard
from instar.interchange.convert import write_hub_folder
from instar.interchange.model import Model
from instar.interchange.parameters import flatten
from instar.models.language_model import LanguageModel
from instar.stages.config import DataConfig
from instar.stages.prefix import check_dataset

LENGTH, STEPS = 96, 100
# What the assistant says at first, and after it was asked again.
FIRST, SECOND = "was good", "bad x12"


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> pathlib.Path:
    """A folder of transformers' with fresh parameters."""
    folder = tmp_path_factory.mktemp("chatglm")
    made = train_chat_huggingface()
    made.add_special_tokens(["[MASK]"])
    made.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    spec = chatglm1(
        depth=2,
        width=24,
        heads=3,
        mlp_width=48,
        vocab_size=tokenizer.vocab_size,
        max_positions=LENGTH,
        start_id=tokenizer.token_id("<sop>"),
        mask_ids=(tokenizer.token_id("[gMASK]"), tokenizer.token_id("[MASK]")),
    )
    read = flatten(LanguageModel(spec).init(jax.random.key(1))).__getitem__
    card = ModelCard(spec, tokenizer, stop_ids=(tokenizer.token_id("<eop>"),))
    write_hub_folder(card, lambda path: np.asarray(read(path)), folder / "model", np.dtype("f4"))
    return folder / "model"


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> pathlib.Path:
    """Dialogues of one round and of two."""
    path, rng = tmp_path_factory.mktemp("chats") / "chats.jsonl", random.Random(0)
    with path.open("w") as file:
        for number in range(200):
            turns = []
            for answer in (FIRST, SECOND)[: 1 + number % 2]:
                asked = " ".join(rng.choices("the film was bad".split(), k=2))
                turns.append({"role": "user", "content": asked})
                turns.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def prepared(
    dialogues: pathlib.Path, parent: pathlib.Path, folder: pathlib.Path, **changes
) -> pathlib.Path:
    source = {"name": "chats", "kind": "jsonl", "path": str(dialogues), "dialogue": "messages"}
    settings = {
        "sources": [source],
        "tokenizer": {"path": str(parent / "tokenizer.json")},
        "chat_template": "chatglm",
        "sequence_lengths": [LENGTH],
        "held_out": 0.1,
    }
    prepare(build(settings | changes, PrepareConfig), folder)
    return folder


@pytest.fixture(scope="module")
def data(dialogues, parent) -> pathlib.Path:
    return prepared(dialogues, parent, dialogues.parent / "data")


@pytest.fixture(scope="module")
def config(parent, data) -> pathlib.Path:
    settings = {
        "parent": str(parent),
        "data": {"path": str(data), "sequence_length": LENGTH},
        "batch": {"size": 8},
        "steps": STEPS,
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"kind": "linear"},
        "checkpoint": {"minutes": None},
        "evaluation": {"every": STEPS, "rows": 8, "prompts": ("the film",)},
        "logging": {"tensorboard": False},
    }
    return write_config(data.parent / "sft.py", settings)


@pytest.fixture(scope="module")
def tuned(config) -> pathlib.Path:
    folder = config.parent / "tuned"
    done = instar("sft", "--config", config, "--workdir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(data) -> dict[str, np.ndarray]:
    """The rows of the run's first step."""
    dataset = TokenDataset.open(data)
    found = TrainingRows(dataset, sequence_length=LENGTH, weights={}, seed=0).rows(np.arange(8))
    assert (found["segment_ids"].max(1) > 1).any()
    return found


def texts_of(rows: dict[str, np.ndarray]) -> list[list[int]]:
    """The texts in some rows, whole: the last token of one is a target alone."""
    found = []
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            places = np.flatnonzero(rows["segment_ids"][row] == segment)
            text = rows["tokens"][row, places].tolist()
            last = rows["weights"][row, places[-1]] > 0
            found.append([*text, int(rows["targets"][row, places[-1]])] if last else text)
    return found


def test_rows_mark_their_prefixes_and_learn_what_stands_behind(rows, parent):
    tokenizer, spec = load_tokenizer(parent), load(parent).spec
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    for text in texts_of(rows):
        start = text.index(spec.prefix.start_id)
        special = [names[token] for token in text if token in names]
        assert special == ["[gMASK]", "<sop>", "<eop>"]
        assert tokenizer.decode(text[start:]) in (FIRST, SECOND)
        prompt = tokenizer.decode(text[:start])
        assert ("[Round 1]" in prompt) == (tokenizer.decode(text[start:]) == SECOND)
    # From <sop> on, all tokens of a text are learnt, and none before.
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            places = np.flatnonzero(rows["segment_ids"][row] == segment)
            start = rows["tokens"][row, places].tolist().index(spec.prefix.start_id)
            weights = rows["weights"][row, places]
            assert not weights[: start - 1].any() and weights[start - 1 : -1].all()


@pytest.mark.parametrize("kind", ["huggingface", "llama"])
def test_a_text_to_go_on_with_ends_with_the_start_and_begins_with_none(kind, parent, tmp_path):
    """Though LLaMA's tokenizer has texts begin with a BOS."""
    folder = tmp_path / "model"
    shutil.copytree(parent, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    one_of_each_kind(tmp_path)[kind].save(folder)
    model = load(folder)
    mask, start = model.spec.prefix.mask_ids[0], model.spec.prefix.start_id
    assert model.encode("the film") == [*model.tokenizer.encode("the film"), mask, start]


def loss_of_each_alone(model: Model, texts: list[list[int]]) -> float:
    """The mean over all tokens from <sop> on, of texts in rows of their own."""
    nats, count = 0.0, 0
    for text in texts:
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(text)] = text
        real = np.arange(LENGTH)[None] < len(text)
        logits = np.float64(
            jitted(model)(model.params, padded, segment_ids=real.astype(np.int32))[0]
        )
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(text.index(model.spec.prefix.start_id), len(text)):
            nats -= log_probs[place - 1, text[place]]
            count += 1
    return nats / count


def test_the_loss_is_that_of_each_dialogue_alone(tuned, parent, rows):
    """By the imported model."""
    expected = loss_of_each_alone(load(parent), texts_of(rows))
    assert losses(tuned)[1] == pytest.approx(expected, rel=1e-5)


LOGITS = {}


def jitted(model):
    return LOGITS.setdefault(id(model), jax.jit(model.language_model.logits))


def check_that_no_target_is_seen(model: Model, rows: dict[str, np.ndarray]) -> None:
    """Of logits that predict a target, none changes with it or with what comes behind."""
    places = {name: jnp.asarray(rows[name]) for name in ("positions", "segment_ids")}
    run = jax.jit(lambda tokens: model.language_model.logits(model.params, tokens, **places))
    before = np.asarray(run(jnp.asarray(rows["tokens"])))
    start, rng = model.spec.prefix.start_id, np.random.default_rng(0)
    row = int(np.argmax(rows["segment_ids"].max(1)))
    learnt = [
        place
        for place in np.flatnonzero(rows["weights"][row])
        if rows["targets"][row, place] != start
    ]
    assert len(learnt) > 4
    for place in rng.choice(learnt, 6, replace=False):
        changed = rows["tokens"].copy()
        behind = (rows["segment_ids"][row] == rows["segment_ids"][row, place]) & (
            np.arange(LENGTH) > place
        )
        changed[row, behind] = rng.integers(100, 300, behind.sum())  # none of them special
        after = np.asarray(run(jnp.asarray(changed)))
        np.testing.assert_allclose(after[row, : place + 1], before[row, : place + 1], atol=1e-6)
        if behind.any():
            assert np.abs(after[row, behind] - before[row, behind]).max() > 1e-3


def test_no_target_of_a_dialogue_is_seen_by_what_predicts_it(rows, parent):
    check_that_no_target_is_seen(load(parent), rows)


def test_it_learns_to_answer_in_both_rounds_and_to_stop(tuned):
    model = load(tuned)
    asked = [{"role": "user", "content": "the film"}]
    again = [*asked, {"role": "assistant", "content": FIRST}, {"role": "user", "content": "was"}]
    greedy = SamplingConfig(max_new_tokens=16, temperature=0)
    answers = model.generate([asked, again], sampling=greedy)
    assert [(a.text, a.reason) for a in answers] == [(FIRST, "stop"), (SECOND, "stop")]


# --- Reward and PPO -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def later(tuned, tmp_path_factory) -> dict[str, dict]:
    """The settings of both stages behind."""
    folder = tmp_path_factory.mktemp("later")
    prompts = ["the film", "was bad", "film film", "the bad"] * 2
    pairs = [{"prompt": p, "chosen": FIRST, "rejected": SECOND} for p in prompts]
    for name, lines in (("prompts", [{"prompt": p} for p in prompts]), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {
        "parent": str(tuned),
        "batch": {"size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "logging": {"tensorboard": False},
    }
    reward = {"data": {"path": str(folder / "pairs.jsonl"), "kind": "pairs"}, "steps": 12}
    reward["data"] |= {"completions": 2, "max_length": 48}
    ppo = {
        "reward": {"model": str(folder / "reward")},
        "prompts": {"path": str(folder / "prompts.jsonl"), "max_length": 24},
        "response": {"max_new_tokens": 8},
        "steps": 2,
        "update": {"minibatch": 8, "epochs": 1},
    }
    return {"folder": folder, "reward": common | reward, "ppo": common | ppo}


@pytest.mark.exhaustive
def test_reward_and_ppo_go_on_from_it(later):
    folder = later["folder"]
    for stage in ("reward", "ppo"):
        config = write_config(folder / f"{stage}.py", later[stage])
        done = instar(stage, "--config", config, "--workdir", folder / stage)
        assert done.returncode == 0, done.stderr
    model = load(folder / "reward")
    good, bad = model.score(["the film"] * 2, [FIRST, SECOND])
    assert good > bad + 0.5
    lines = [json.loads(x) for x in (folder / "ppo/metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "score" in line]
    assert len(scored) == 2 and np.isfinite(scored[-1]["score"])
    # A rollout reads prompts by themselves, and the update prompts with responses.
    assert scored[0]["mismatch"] < 1e-4
    # What the policy learnt to say, in each of the eight prompts, as the reward model reads it.
    prompts = [json.loads(x)["prompt"] for x in (folder / "prompts.jsonl").open()]
    expected = model.score(prompts, [FIRST] * len(prompts)).mean()
    assert scored[0]["score"] == pytest.approx(expected, abs=0.05 * (good - bad))


# --- Plain texts --------------------------------------------------------------------------------

# What a text has of this, from anywhere on and round and round, says what comes next.
ROUND = "the film was a quiet story".split()
BLANK_LENGTH, BLANK_STEPS = 48, 300


@pytest.fixture(scope="module")
def tales(tmp_path_factory) -> pathlib.Path:
    path, rng = tmp_path_factory.mktemp("blanks") / "tales.jsonl", random.Random(0)
    with path.open("w") as file:
        for _ in range(600):
            first, count = rng.randrange(len(ROUND)), rng.randint(3, 60)
            words = (ROUND[(first + n) % len(ROUND)] for n in range(count))
            file.write(json.dumps({"text": " ".join(words) + "."}) + "\n")
    return path


@pytest.fixture(scope="module")
def blanks(tales) -> pathlib.Path:
    """Prepared with a tokenizer of its own, by the command."""
    settings = {
        "sources": [{"name": "tales", "kind": "jsonl", "path": str(tales)}],
        "tokenizer": {"vocab_size": 340},
        "sequence_lengths": [BLANK_LENGTH, 2 * BLANK_LENGTH],
        "held_out": 0.05,
        "infilling": {"short_share": 0.5},
    }
    config, folder = write_config(tales.parent / "data.py", settings), tales.parent / "data"
    done = instar("prepare", "--config", config, "--workdir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pretrain_config(blanks) -> pathlib.Path:
    settings = {
        "data": {"path": str(blanks), "sequence_length": 2 * BLANK_LENGTH},
        "model": {"family": "chatglm1", "depth": 2, "width": 24, "heads": 3, "mlp_width": 48},
        "batch": {"size": 8},
        "steps": BLANK_STEPS,
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"kind": "linear", "warmup_steps": 5},
        "checkpoint": {"minutes": None, "keep_steps": BLANK_STEPS // 2},
        "evaluation": {"every": BLANK_STEPS, "rows": 8, "prompts": ("the film",)},
        "logging": {"tensorboard": False},
    }
    return write_config(blanks.parent / "pretrain.py", settings)


@pytest.fixture(scope="module")
def pretrained(pretrain_config) -> pathlib.Path:
    folder = pretrain_config.parent / "pretrained"
    done = instar("pretrain", "--config", pretrain_config, "--workdir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def blank_rows(blanks) -> dict[str, np.ndarray]:
    """The rows of the first step behind the checkpoint in the middle of the run."""
    numbers = BLANK_STEPS // 2 * 8 + np.arange(8)
    dataset = TokenDataset.open(blanks)
    found = TrainingRows(dataset, sequence_length=2 * BLANK_LENGTH, weights={}, seed=0)
    return found.rows(numbers)


@pytest.mark.exhaustive
def test_the_loss_is_that_of_each_blank_alone(pretrained, blank_rows):
    model, texts = load(pretrained / "checkpoints" / str(BLANK_STEPS // 2)), texts_of(blank_rows)
    masks = {mask for mask in model.spec.prefix.mask_ids for text in texts if mask in text}
    assert len(masks) == 2 and (blank_rows["segment_ids"].max(1) > 1).any()
    expected = loss_of_each_alone(model, texts)
    assert losses(pretrained)[BLANK_STEPS // 2 + 1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.exhaustive
def test_no_target_of_a_blank_is_seen_by_what_predicts_it(pretrained, blank_rows):
    check_that_no_target_is_seen(load(pretrained), blank_rows)


@pytest.mark.exhaustive
def test_it_learns_to_go_on_with_texts_and_to_fill_in_their_blanks(pretrained):
    model, found = load(pretrained), losses(pretrained)
    assert found[1] > 5 and found[BLANK_STEPS] < 0.5 * found[1]
    special = model.tokenizer.special_tokens
    gmask, mask, start, end = (special[n] for n in ("[gMASK]", "[MASK]", "<sop>", "<eop>"))
    assert (model.spec.prefix.start_id, model.spec.prefix.mask_ids) == (start, (gmask, mask))
    prompt = " ".join(ROUND[:4])
    assert model.encode(prompt) == [*model.tokenizer.encode(prompt), gmask, start]
    assert {end, model.tokenizer.eos_id} <= set(model.card.stop_ids)
    greedy = SamplingConfig(max_new_tokens=8, temperature=0)
    (said,) = model.generate([prompt], sampling=greedy)
    assert said.text.startswith(" quiet story the")
    before, after = (model.tokenizer.encode(text) for text in ("story the film", " quiet story"))
    (said,) = model.generate([[*before, mask, *after, start]], sampling=greedy)
    assert said.text.startswith(" was")
    lines = [json.loads(x) for x in (pretrained / "samples.jsonl").read_text().splitlines()]
    assert lines[-1]["prompt"] == "the film"


# --- What is refused ----------------------------------------------------------------------------


def refusal(capsys, *words: object) -> str:
    code = cli.main([str(word) for word in words])
    stderr = capsys.readouterr().err
    assert code == 2 and stderr.count("instar: error: ") == 1, stderr
    return stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "chatml"}, "the chat template does not end it with the token"),
        ({"sources": "and texts"}, "is not trained on plain texts, which mark none, as those of"),
        (
            {"sources": "and texts", "infilling": {"start": "<s>"}},
            "prepare it with the names of the model's as infilling.start",
        ),
    ],
)
def test_texts_without_a_prefix_of_their_own_are_refused(
    changes, message, dialogues, parent, config, tmp_path, capsys
):
    if "sources" in changes:
        plain = tmp_path / "plain.jsonl"
        plain.write_text("\n".join(json.dumps({"text": f"film {n}"}) for n in range(50)))
        chats = {"name": "chats", "kind": "jsonl", "path": str(dialogues), "dialogue": "messages"}
        changes = changes | {"sources": [chats, {"name": "a", "kind": "jsonl", "path": str(plain)}]}
    data = prepared(dialogues, parent, tmp_path / "data", **changes)
    words = ["sft", "--config", config, "--workdir", tmp_path / "run"]
    words.append(f"--config.data.path={data}")
    assert message in refusal(capsys, *words)
    assert not (tmp_path / "run").exists()


def test_blanks_beside_dialogues_are_accepted(dialogues, parent, tales, tmp_path):
    sources = [
        {"name": "chats", "kind": "jsonl", "path": str(dialogues), "dialogue": "messages"},
        {"name": "tales", "kind": "jsonl", "path": str(tales)},
    ]
    data = prepared(dialogues, parent, tmp_path / "data", sources=sources, infilling={})
    spec, dataset = load(parent).spec, TokenDataset.open(data)
    check_dataset(spec, dataset, DataConfig(path=str(data), sequence_length=LENGTH))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "plain"}, "(infilling in the config of instar prepare)"),
        ({"data.sequence_length": BLANK_LENGTH}, "cannot read them in pieces"),
        ({"model.family": "llama"}, "is prepared with infilling, for a model whose texts begin"),
    ],
)
def test_blanks_that_do_not_fit_the_model_are_refused(
    changes, message, blanks, tales, pretrain_config, tmp_path, capsys
):
    words = [f"--config.{name}={value}" for name, value in changes.items() if name != "data"]
    if "data" in changes:
        settings = json.loads((blanks / "manifest.json").read_text())["config"]
        settings |= {"infilling": None, "tokenizer": {"path": str(blanks / "tokenizer")}}
        prepare(build(settings, PrepareConfig), tmp_path / "data")
        words.append(f"--config.data.path={tmp_path / 'data'}")
    given = ("pretrain", "--config", pretrain_config, "--workdir", tmp_path / "run", *words)
    assert message in refusal(capsys, *given)
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_template_that_marks_no_prefix_is_refused(stage, later, parent, tmp_path, capsys):
    settings = later[stage] | {"parent": str(parent), "chat_template": "plain"}
    if stage == "ppo":
        settings["reward"] = {"scorer": {"function": "json:dumps"}}
    config = write_config(tmp_path / "config.py", settings)
    message = refusal(capsys, stage, "--config", config, "--workdir", tmp_path / "run")
    assert "parent" in message and "does not end it with the token" in message
