"""The config engine: what it accepts, and that each mistake gives one sentence naming the field."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.config import build, load, to_dict
from instar.errors import UserError

pytestmark = pytest.mark.smoke


@dataclass(frozen=True)
class Schedule:
    kind: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = 0


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    decay: tuple[str, ...] = ("matrix",)
    clip_norm: float | None = 1.0
    nesterov: bool = False
    schedule: Schedule = Schedule()

    def check(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate must be positive, not {self.learning_rate}")


@dataclass(frozen=True)
class Source:
    path: str
    column: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    every: int
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    steps: int
    optimizer: Optimizer = Optimizer(learning_rate=3e-4)
    sources: tuple[Source, ...] = (Source("a.txt"), Source("b.txt", weight=2.0))
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    mesh: tuple[int, int] = (1, 1)
    evaluation: Evaluation | None = None
    limit: int | Literal["all"] = "all"
    extra: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if self.optimizer.schedule.warmup_steps > self.steps:
            raise UserError("optimizer.schedule.warmup_steps must not exceed steps")


@pytest.fixture
def config_file(tmp_path):
    def write(body: str) -> str:
        path = tmp_path / "config.py"
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        path.write_text(
            "from ml_collections import config_dict\n\n\n"
            f"def get_config():\n    c = config_dict.ConfigDict()\n{lines}\n    return c\n"
        )
        return str(path)

    return write


# --- what is accepted -------------------------------------------------------------------------


def test_a_file_gives_a_typed_config_with_defaults(config_file):
    path = config_file(
        """
c.steps = 10
c.optimizer = config_dict.ConfigDict({"learning_rate": 1})
c.sources = [{"path": "reviews.csv", "column": "text"}]
c.mesh = [2, 4]
"""
    )
    config = load(path, [], Stage)
    assert config == Stage(
        steps=10,
        optimizer=Optimizer(learning_rate=1.0),
        sources=(Source("reviews.csv", column="text"),),
        mesh=(2, 4),
    )
    assert isinstance(config.optimizer.learning_rate, float)


def test_fields_left_out_of_a_nested_config_come_from_the_default_instance():
    config = build({"steps": 1, "optimizer": {"nesterov": True}}, Stage)
    assert config.optimizer == Optimizer(learning_rate=3e-4, nesterov=True)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps", "20", lambda c: c.steps == 20),
        ("optimizer.learning_rate", "3e-4", lambda c: c.optimizer.learning_rate == 3e-4),
        ("optimizer.schedule.kind", "linear", lambda c: c.optimizer.schedule.kind == "linear"),
        ("optimizer.clip_norm", "None", lambda c: c.optimizer.clip_norm is None),
        ("optimizer.nesterov", "true", lambda c: c.optimizer.nesterov is True),
        ("optimizer.nesterov", "False", lambda c: c.optimizer.nesterov is False),
        ("optimizer.decay", "('a', 'b')", lambda c: c.optimizer.decay == ("a", "b")),
        (
            "sources.1.path",
            "2024",
            lambda c: c.sources == (Source("a.txt"), Source("2024", None, 2)),
        ),
        ("sources.0.column", "None", lambda c: c.sources[0].column is None),
        ("sources.0.column", "true", lambda c: c.sources[0].column == "true"),
        ("sources", "[{'path': 'x'}]", lambda c: c.sources == (Source("x"),)),
        ("weights.b", "0.5", lambda c: c.weights == {"a": 1.0, "b": 0.5}),
        ("mesh.1", "8", lambda c: c.mesh == (1, 8)),
        ("evaluation.every", "5", lambda c: c.evaluation == Evaluation(every=5)),
        ("limit", "7", lambda c: c.limit == 7),
        ("limit", "all", lambda c: c.limit == "all"),
        ("extra.a.b", "[1, {'c': None}]", lambda c: c.extra == {"a": {"b": (1, {"c": None})}}),
    ],
)
def test_overrides_reach_every_kind_of_field(config_file, key, text, expected):
    config = load(config_file("c.steps = 10"), [(key, text)], Stage)
    assert expected(config)


def test_overrides_reach_what_the_file_sets_and_the_last_one_wins(config_file):
    path = config_file(
        """
c.steps = 10
c.sources = (config_dict.ConfigDict({"path": "x"}), {"path": "y"})
c.evaluation = config_dict.ConfigDict({"every": 5})
c.lock()
"""
    )
    overrides = [
        ("sources.0.weight", "3"),
        ("sources.1.path", "z"),
        ("evaluation", "None"),
        ("optimizer.clip_norm", "2"),
        ("optimizer.clip_norm", "4"),
    ]
    config = load(path, overrides, Stage)
    assert config.sources == (Source("x", weight=3.0), Source("z"))
    assert config.evaluation is None
    assert config.optimizer.clip_norm == 4.0


def test_values_that_the_file_computes_follow_an_override(config_file):
    path = config_file(
        """
c.steps = config_dict.FieldReference(100)
c.optimizer = config_dict.ConfigDict()
c.optimizer.schedule = config_dict.ConfigDict({"warmup_steps": c.get_ref("steps") // 10})
"""
    )
    assert load(path, [("steps", "500")], Stage).optimizer.schedule.warmup_steps == 50


sources = st.builds(
    Source, st.text(), st.none() | st.text(), st.floats(allow_nan=False, allow_infinity=False)
)
stages = st.builds(
    Stage,
    steps=st.integers(min_value=100),
    optimizer=st.builds(
        Optimizer,
        learning_rate=st.floats(min_value=1e-6, max_value=1.0),
        decay=st.lists(st.text()).map(tuple),
        nesterov=st.booleans(),
        schedule=st.builds(Schedule, st.sampled_from(["cosine", "linear"]), st.integers(0, 100)),
    ),
    sources=st.lists(sources, max_size=3).map(tuple),
    weights=st.dictionaries(st.text(), st.floats(0, 1), max_size=3),
    evaluation=st.none() | st.builds(Evaluation, st.integers()),
    limit=st.integers() | st.just("all"),
)


@given(stages)
def test_a_config_survives_json(config):
    assert build(json.loads(json.dumps(to_dict(config))), Stage) == config


ABSENT = object()


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": ABSENT}, ["steps", "required", "int", "--config.steps"]),
        ({"stpes": 1}, ["stpes", "did you mean 'steps'"]),
        ({"optimizer": {"nesterof": 1}, "steps": ABSENT}, ["did you mean 'optimizer.nesterov'"]),
        ({"zzz": 1}, ["zzz", "steps, optimizer, sources"]),
        ({"optimizer": {"learing_rate": 1}}, ["did you mean 'optimizer.learning_rate'"]),
        ({"optimizer": {"schedule": {"q": 1}}}, ["optimizer.schedule.q", "kind, warmup_steps"]),
        ({"optimizer": 3}, ["optimizer", "fields of Optimizer", "3 (int)"]),
        ({"steps": "ten"}, ["steps", "expected int", "'ten' (str)"]),
        ({"steps": True}, ["steps", "expected int", "True (bool)"]),
        ({"steps": 2.5}, ["steps", "expected int", "2.5 (float)"]),
        ({"steps": None}, ["steps", "expected int", "got None"]),
        ({"optimizer": {"nesterov": 1}}, ["optimizer.nesterov", "expected bool", "1 (int)"]),
        ({"optimizer": {"clip_norm": True}}, ["optimizer.clip_norm", "float or None"]),
        ({"optimizer": {"learning_rate": float("nan")}}, ["learning_rate", "finite", "nan"]),
        ({"optimizer": {"learning_rate": 10**400}}, ["learning_rate", "finite"]),
        ({"optimizer": {"decay": "matrix"}}, ["optimizer.decay", "list of str"]),
        ({"optimizer": {"decay": ["a", 1]}}, ["optimizer.decay.1", "expected str"]),
        ({"optimizer": {"schedule": {"kind": "cos"}}}, ["'cosine' or 'linear'", "'cos'"]),
        ({"sources": [{"path": "a"}, {}]}, ["sources.1.path", "required"]),
        ({"mesh": [1]}, ["mesh", "[int, int]"]),
        ({"weights": {"a": "x"}}, ["weights.a", "expected float"]),
        ({"weights": {1: 1.0}}, ["weights", "names as keys"]),
        ({"evaluation": {}}, ["evaluation.every", "required"]),
        ({"evaluation": "off"}, ["evaluation", "Evaluation or None", "'off'"]),
        ({"limit": "some"}, ["limit", "int or 'all'", "'some'"]),
    ],
)
def test_wrong_values_are_named(values, words):
    given = {"steps": 1, **values}
    with pytest.raises(UserError) as caught:
        build({key: each for key, each in given.items() if each is not ABSENT}, Stage)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_check_runs_innermost_first_and_on_defaults():
    with pytest.raises(UserError, match="learning_rate must be positive"):
        build(
            {"steps": 1, "optimizer": {"learning_rate": 0, "schedule": {"warmup_steps": 9}}}, Stage
        )
    with pytest.raises(UserError, match="warmup_steps must not exceed steps"):
        build({"steps": 1, "optimizer": {"schedule": {"warmup_steps": 9}}}, Stage)

    @dataclass(frozen=True)
    class WithBadDefault:
        optimizer: Optimizer = Optimizer(learning_rate=-1.0)

    with pytest.raises(UserError, match="learning_rate must be positive"):
        build({}, WithBadDefault)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("stpes", "1", ["did you mean 'steps'"]),
        ("optimizer.schedule.knid", "linear", ["did you mean 'optimizer.schedule.kind'"]),
        ("steps", "fast", ["steps", "expected int", "'fast'"]),
        ("steps", "1e3", ["steps", "expected int", "1000.0"]),
        ("steps.x", "1", ["steps.x", "steps is int"]),
        ("sources.x.path", "a", ["sources.x", "index", "sources.0"]),
        ("sources.5.path", "a", ["sources.5", "has 2"]),
        ("mesh.2", "1", ["mesh.2", "2 entries"]),
        ("extra.a.b.c", "1", ["extra.a.b", "1.5 (float)", "nothing below"]),
        ("extra.list.x", "1", ["extra.list.x", "expected an index"]),
        ("extra.list.2", "1", ["extra.list.2", "has 2"]),
    ],
)
def test_wrong_overrides_are_named(config_file, key, text, words):
    with pytest.raises(UserError) as caught:
        load(
            config_file("c.steps = 10\nc.extra = {'a': {'b': 1.5}, 'list': [1, 2]}"),
            [(key, text)],
            Stage,
        )
    for word in words:
        assert word in str(caught.value)


def test_a_value_that_the_file_leaves_open_is_asked_for(config_file):
    path = config_file("c.steps = config_dict.required_placeholder(int)")
    with pytest.raises(UserError, match=r"steps: .*--config\.steps=VALUE"):
        load(path, [], Stage)
    assert load(path, [("steps", "3")], Stage).steps == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, ["does not exist"]),
        ("def get_config(:\n", ["line 1", "SyntaxError"]),
        ("x = 1\n", ["must define get_config()"]),
        ("def get_config():\n    return missing\n", ["line 2", "NameError"]),
        ("def get_config():\n    return {'steps': 1}\n", ["ConfigDict", "dict"]),
        ("\x00", ["SyntaxError"]),
    ],
)
def test_a_broken_file_is_named(tmp_path, source, words):
    path = tmp_path / "broken.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError) as caught:
        load(str(path), [], Stage)
    for word in ["broken.py", *words]:
        assert word in str(caught.value)


# --- files that take an argument --------------------------------------------------------------

OF_A_SIZE = """
from typing import Literal

from ml_collections import ConfigDict

SIZES = {"125m": 600, "1.3b": 200}


def get_config(size: Literal[*SIZES]):
    return ConfigDict({"steps": SIZES[size]})
"""
OF_A_TEXT = OF_A_SIZE.replace("size: Literal[*SIZES]", 'size="125m"')


@pytest.mark.parametrize(
    ("source", "argument", "steps"),
    [
        (OF_A_SIZE, ":125m", 600),
        (OF_A_SIZE, ":1.3b", 200),
        (OF_A_TEXT, ":1.3b", 200),
        (OF_A_TEXT, "", 600),
        (
            OF_A_SIZE.replace("size: Literal[*SIZES]", "size: int").replace("SIZES[size]", "size"),
            ":7",
            7,
        ),
    ],
)
def test_what_stands_behind_a_colon_is_the_argument_of_get_config(
    tmp_path, source, argument, steps
):
    (tmp_path / "model.py").write_text(source)
    assert load(f"{tmp_path}/model.py{argument}", [], Stage).steps == steps
    assert load(f"{tmp_path}/model.py{argument}", [("steps", "5")], Stage).steps == 5


@pytest.mark.parametrize(
    ("source", "argument", "words"),
    [
        (OF_A_SIZE, "", ["model.py needs its size behind a colon: one of 125m, 1.3b"]),
        (OF_A_SIZE, ":", ["size must be one of 125m, 1.3b, not ''"]),
        (OF_A_SIZE, ":7b", ["model.py: size must be one of 125m, 1.3b, not '7b'"]),
        (OF_A_TEXT, ":7b", ["line 10", "KeyError: '7b'"]),
        (OF_A_SIZE.replace("size: Literal[*SIZES]", "size: int"), ":7b", ["size must be int"]),
        (OF_A_SIZE.replace("size: L", "a, size: L"), ":7b", ["may take one argument at most"]),
        (OF_A_SIZE.replace("size: Literal[*SIZES]", ""), ":7b", ["takes no argument", "':7b'"]),
    ],
)
def test_an_argument_that_does_not_fit_is_named_beside_the_choices(
    tmp_path, source, argument, words
):
    (tmp_path / "model.py").write_text(source)
    with pytest.raises(UserError) as caught:
        load(f"{tmp_path}/model.py{argument}", [], Stage)
    for word in words:
        assert word in str(caught.value)
