"""The configs that are shipped: that they load and fit, and say what was published."""

import ast
import collections
import itertools
import math
import pathlib
import re
import shlex
import typing

import jax
import jax.numpy as jnp
import pytest
from published import CHATGLM_6B_TIED, PUBLISHED

from instar.arguments import option_pairs
from instar.commands import COMMANDS, resolve
from instar.config import load
from instar.errors import UserError
from instar.families.registry import build_spec
from instar.models.language_model import LanguageModel
from instar.schema import build, to_dict
from instar.stages.pretrain import PretrainConfig
from instar.training.batch import rows_of_steps
from instar.training.optimizer import make_optimizer, make_schedule
from instar.training.state import make_initializer

ROOT = pathlib.Path(__file__).parents[1] / "configs"
# Sweeps change other configs; stages/test_sweep_command.py is about them.
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "sweep")


def arguments(path: pathlib.Path) -> list[str]:
    """What may stand behind a config file: a colon and an argument, or nothing."""
    space: dict = {}
    exec(compile(path.read_text(), path, "exec"), space)
    hints = typing.get_type_hints(space["get_config"])
    hints.pop("return", None)
    return [f":{choice}" for hint in hints.values() for choice in typing.get_args(hint)] or [""]


def shipped(folder: str) -> list[str]:
    paths = sorted((ROOT / folder).glob("*.py"))
    return [f"{folder}/{path.name}{each}" for path in paths for each in arguments(path)]


def fitting(path: str, command: str, changes: list[tuple[str, str]]) -> object:
    """The config that a command is told."""
    return load(path, changes, resolve(COMMANDS[command].config))


FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
RECIPES = [name for name in shipped("pretrain") if "quickstart" not in name]


def recipe(name: str) -> PretrainConfig:
    return load(str(ROOT / name), [], PretrainConfig).with_steps()


@pytest.mark.smoke
@pytest.mark.parametrize("name", [name for folder in FOLDERS for name in shipped(folder)])
def test_every_config_fits_its_command(name):
    folder = name.split("/")[0]
    config = fitting(str(ROOT / name), "prepare" if folder == "data" else folder, [])
    assert build(to_dict(config), type(config)) == config


# A command of a docstring, joined where a backslash goes on with it.
COMMAND = re.compile(r"^ *(?:\S+=\S+ )?(?:launch/local.sh )?instar (\w+) (.*)$", re.MULTILINE)


@pytest.mark.parametrize("name", [f"{path.parent.name}/{path.name}" for path in FILES])
def test_the_commands_of_a_docstring_fit(name, monkeypatch):
    """Those that take a config, with what they change of it."""
    monkeypatch.chdir(ROOT.parent)
    text = ast.get_docstring(ast.parse((ROOT / name).read_text())).replace("\\\n", " ")
    found = COMMAND.findall(text)
    assert found or "smollm2" in name
    for command, words in found:
        given, _ = option_pairs(shlex.split(words))
        options = {option: value for option, value in given if "." not in option}
        if "--config" in options and command != "sweep":
            changes = [(key.removeprefix("--config."), v) for key, v in given if "." in key]
            fitting(options["--config"], command, changes)


def test_the_recipes_are_those_that_are_asked_for():
    names = [name.split("/")[1] for name in RECIPES]
    counts = collections.Counter(name.split(".py")[0] for name in names)
    expected = dict(gpt3=8, opt=9, bloom=6, llama=11, falcon=3)
    assert counts == expected | dict(baichuan=2, baichuan2=2, chatglm=1, moss=1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_parameters_and_a_state_for_them(name):
    """Built as shapes, with the moments of its optimiser; no array is made."""
    config = recipe(name)
    expected, tolerance = (
        CHATGLM_6B_TIED
        if config.model.family == "chatglm1"
        else PUBLISHED[config.model.family, config.model.size, config.model.vocab_size]
    )
    length = config.data.sequence_length
    spec = build_spec(config.model, vocab_size=1, max_positions=length)
    assert spec.max_positions == length
    model = LanguageModel(spec)
    initialize = make_initializer(
        model, make_optimizer(config.optimizer, model.axes), config.initialization
    )
    state = jax.eval_shape(initialize, jax.random.key(0))
    params = size_of(state.params)
    assert params == pytest.approx(expected, rel=tolerance, abs=0)
    assert 2 * params <= size_of(state.opt_state) < 2 * params + 100


def size_of(tree: dict) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# The published learning rate after so many billion tokens: the peak where the warm-up ends, its
# lowest where the decay does, and on the way what the comment says.
RATES = [
    ("gpt3.py:125m", 0.375, 6e-4),
    ("gpt3.py:125m", 130.1875, 0.55 * 6e-4),  # the middle of the cosine is (1 + .1) / 2 of the peak
    ("gpt3.py:125m", 260, 6e-5),
    ("gpt3.py:125m", 300, 6e-5),
    ("gpt3.py:175b", 0.1875, 0.3e-4),
    ("gpt3.py:175b", 0.375, 0.6e-4),
    ("gpt3.py:175b", 260, 0.6e-5),
    ("opt.py:175b", 2000 * 1024 * 2048 / 1e9, 1.2e-4),
    ("opt.py:175b", 300, 1.2e-5),
    ("opt.py:66b", 0.375, 0.8e-4),
    ("opt.py:66b", 150.1875, 0.55 * 0.8e-4),
    ("bloom.py:176b", 0.375, 6e-5),
    ("bloom.py:176b", 366, 7.4986e-6),  # 178.7 of 200 million samples: not yet 6e-6
    ("bloom.py:7.1b", 0.375, 1.2e-4),
    ("llama.py:65b", 2000 * 4_194_304 / 1e9, 1.5e-4),
    ("llama.py:65b", 1400, 1.5e-5),
    ("llama.py:2-7b", 2000, 3e-5),
    ("falcon.py:7b", 4, 6e-4),
    ("falcon.py:7b", 1500, 1.2e-5),
    ("falcon.py:180b", 3500, 1.25e-5),
    ("baichuan2.py:13b", 2000 * 4_194_304 / 1e9, 1.5e-4),
]


@pytest.mark.parametrize("name", sorted({name for name, _, _ in RATES}))
def test_a_schedule_has_the_published_rates(name):
    config = recipe(f"pretrain/{name}")
    schedule = make_schedule(config.schedule, config.steps, config.batch)
    sizes = itertools.islice(rows_of_steps(config.batch), config.steps)
    read = list(itertools.accumulate(sizes))
    for _, billions, expected in (each for each in RATES if each[0] == name):
        rows = billions * 1e9 / config.data.sequence_length
        step = next(i for i, done in enumerate(read) if done >= rows or i == len(read) - 1)
        found = config.optimizer.learning_rate * float(schedule(jnp.int32(step)))
        assert found == pytest.approx(expected, rel=0.01), (billions, step)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt3.py:175b", {0: 16, 12.1: 1600}),  # 32k tokens, and 3.2M after 12 billion
        ("gpt3.py:1.3b", {0: 16, 3: 256, 6.1: 512}),
        ("bloom.py:176b", {0: 192, 10: 1104, 20.1: 2048}),
        ("llama.py:3-405b", {0: 1024, 2869: 1024, 2871: 2048}),
        ("falcon.py:40b", {0: 128, 50: 640, 100.1: 1152}),
    ],
)
def test_a_batch_grows_as_published(name, sizes):
    config = recipe(f"pretrain/{name}")
    length, batch = config.data.sequence_length, config.batch
    done, wanted, found = 0, sorted(sizes), {}
    for size in rows_of_steps(batch):
        while wanted and done * length >= wanted[0] * 1e9:
            found[wanted.pop(0)] = size
        if not wanted:
            break
        done += size
    for billions, size in sizes.items():
        assert abs(found[billions] - size) <= batch.ramp.increment, billions
        assert size not in (batch.size, batch.ramp.start) or found[billions] == size


def test_a_budget_in_tokens_is_a_number_of_steps_that_an_override_replaces():
    path = str(ROOT / "pretrain/llama.py:7b")
    config = load(path, [("tokens", "10_000_000"), ("schedule.warmup_steps", "1")], PretrainConfig)
    assert config.steps is None and config.with_steps().steps == 3  # of 4.19 million tokens each
    short = load(path, [("steps", "2500")], PretrainConfig)
    assert short.with_steps() == short


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tokens", "None"), "steps: this field is required, or tokens in its place"),
        (("tokens", "0"), "tokens must be at least 1"),
        (("tokens", "4_000_000_000"), "schedule.warmup_steps .2000. must be smaller than steps"),
        (("max_z_loss", "-1"), "max_z_loss must not be negative"),
        (("embedding_dropout", "1"), "embedding_dropout must be in"),
    ],
)
def test_values_that_make_no_sense_of_a_recipe(change, message):
    with pytest.raises(UserError, match=message):
        load(str(ROOT / "pretrain/llama.py:7b"), [change], PretrainConfig)


def test_what_makes_each_recipe_its_own():
    opt, baichuan2 = recipe("pretrain/opt.py:13b"), recipe("pretrain/baichuan2.py:7b")
    assert (opt.initialization.base_std, opt.dropout, opt.embedding_dropout) == (0.006, 0.1, 0.0)
    assert (baichuan2.max_z_loss, baichuan2.optimizer.clip_norm) == (2e-4, 0.5)
    assert recipe("pretrain/bloom.py:3b").initialization.base_std == 0.0048
    assert recipe("pretrain/falcon.py:40b").z_loss == 1e-4
    spec = build_spec(recipe("pretrain/llama.py:3-70b").model, vocab_size=1, max_positions=8192)
    (layer,) = set(spec.each_layer())
    assert (layer.mixer.kv_heads, layer.mixer.rotary.theta) == (8, 500_000.0)
    assert layer.norm.epsilon == 1e-5
