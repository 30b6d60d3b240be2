"""Scorers from import paths: what is refused, and when."""

import sys

import numpy as np
import pytest

from instar import schema
from instar.errors import UserError
from instar.evaluation.scorers import ScorerConfig, open_scorer

MODULE = """
import numpy as np
from instar.errors import UserError

def length(prompts, completions, factor=1, whole=False):
    texts = [p * whole + c for p, c in zip(prompts, completions)]
    return [len(text) * factor for text in texts]

def returns(prompts, completions, what):
    return {
        "few": [1.0], "many": np.ones((len(completions), 1)), "nan": [1.0, float("nan")],
        "texts": ["a", "b"], "none": None, "ragged": [[1], [1, 2]], "bools": [True, False],
    }[what]

def raises(prompts, completions, user=False):
    raise UserError("ratings.jsonl is lost") if user else KeyError("lost")

class Judge:
    def score(prompts, completions):
        return range(len(completions))

number = 3
"""


@pytest.fixture(autouse=True)
def my_scorers(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(MODULE)
    (tmp_path / "my_broken_scorers.py").write_text("import instar\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_scorers", None)


def config(name, **arguments):
    values = {"function": f"my_scorers:{name}", "arguments": arguments}
    return schema.build(values, ScorerConfig)


def test_scores_are_float64_and_arguments_keep_their_types():
    of = config("length", factor=2, whole=True)
    assert [type(value) for value in of.arguments.values()] == [int, bool]
    scores = open_scorer(of)(["ab", "c"], ["x", "yz"])
    assert scores.dtype == np.float64
    assert scores.tolist() == [6, 6]
    assert open_scorer(config("length", factor=0.5))(["ab"], ["x"]).tolist() == [0.5]
    assert open_scorer(config("Judge.score"))(["a", "b"], ["x", "y"]).tolist() == [0, 1]
    assert open_scorer(config("returns", what="bools"))(["a"] * 2, ["b"] * 2).tolist() == [1, 0]
    assert open_scorer(config("length"))([], []).shape == (0,)


def test_a_config_goes_through_json():
    of = config("length", factor=2, whole=True)
    assert schema.build(schema.to_dict(of), ScorerConfig) == of
    assert schema.build({"function": "a:b"}, ScorerConfig).arguments == {}


@pytest.mark.parametrize("function", ["length", "my_scorers.length", "a:", ":b", "a b:c", "a:b:c"])
def test_a_path_of_another_form_is_refused(function):
    with pytest.raises(UserError, match="MODULE:NAME"):
        schema.build({"function": function}, ScorerConfig)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_missing_scorers:f", "my_missing_scorers cannot be imported.*PYTHONPATH"),
        ("my_broken_scorers:f", "cannot be imported.*division by zero"),
        ("my_scorers:lenght", "has no function lenght"),
        ("my_scorers:number", "has no function number"),
        ("my_scorers:Judge.grade", "has no function Judge.grade"),
    ],
)
def test_what_cannot_be_imported_is_named(function, message):
    with pytest.raises(UserError, match=message):
        open_scorer(ScorerConfig(function))


@pytest.mark.parametrize("arguments", [{"facto": 1}, {"prompts": "x"}])
def test_arguments_that_it_does_not_take_are_refused_at_once(arguments):
    with pytest.raises(UserError, match=r"my_scorers:length .*length\(prompts, completions, fac"):
        open_scorer(config("length", **arguments))
    with pytest.raises(UserError, match="what"):
        open_scorer(config("returns"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("few", r"each of the 2 completions.*\[1\]"),
        ("many", r"each of the 2 completions.*\[2, 1\]"),
        ("nan", "completion 1 is nan"),
        ("texts", "list of numbers"),
        ("none", "list of numbers, not NoneType"),
        ("ragged", "must return numbers"),
    ],
)
def test_results_that_are_no_scores_are_refused(what, message):
    score = open_scorer(config("returns", what=what))
    with pytest.raises(UserError, match=f"scorer my_scorers:returns .*{message}"):
        score(["p", "q"], ["a", "b"])


def test_a_scorer_that_raises_is_named():
    with pytest.raises(UserError, match="scorer my_scorers:raises raised KeyError: 'lost'"):
        open_scorer(config("raises"))(["p"], ["a"])
    with pytest.raises(UserError, match=r"^ratings.jsonl is lost$"):
        open_scorer(config("raises", user=True))(["p"], ["a"])


def test_an_example_tries_it_at_once():
    assert open_scorer(config("length"), example="p")
    with pytest.raises(UserError, match="raised KeyError"):
        open_scorer(config("raises"), example="p")
    with pytest.raises(UserError, match=r"one number for each of the 2 completions"):
        open_scorer(config("returns", what="few"), example="p")
