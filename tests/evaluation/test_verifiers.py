"""The verifier, against the answers that the library gives."""

import json
import sys

import numpy as np
import pytest

from instar.errors import UserError
from instar.evaluation import verifiers
from instar.evaluation.scorers import ScorerConfig, open_scorer

ARGUMENTS = {"task": "chain_sum", "size": 20, "seed": 7}


def test_right_answers_score_one_and_wrong_ones_less(tmp_path):
    library = pytest.importorskip("reasoning_gym")
    verifiers.write_prompts(tmp_path / "deep/prompts.jsonl", **ARGUMENTS)
    lines = (tmp_path / "deep/prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    problems = library.create_dataset("chain_sum", size=20, seed=7)
    answers = [problem["answer"] for problem in problems]
    assert len(prompts) == len(answers) == 20
    config = ScorerConfig("instar.evaluation.verifiers:reasoning_gym", ARGUMENTS)
    score = open_scorer(config, prompts[0])
    dialogues = [
        [{"role": "system", "content": "Add."}, {"role": "user", "content": prompt}]
        for prompt in prompts
    ]
    np.testing.assert_array_equal(score(prompts, [f" {answer}\n" for answer in answers]), 1)
    np.testing.assert_array_equal(score(dialogues, answers), 1)
    # Answers of other questions.
    wrong = [i for i in range(20) if answers[i] != answers[i - 1]]
    assert len(wrong) > 10 and score(prompts, np.roll(answers, 1).tolist())[wrong].max() < 1
    with pytest.raises(UserError, match=r"is none of the 20 questions of chain_sum with seed 7"):
        score(["1 + 1 ="], ["2"])
    with pytest.raises(UserError, match="exists"):
        verifiers.write_prompts(tmp_path / "deep/prompts.jsonl")
    with pytest.raises(UserError, match="no 5 problems of 'chain_sun'"):
        verifiers.reasoning_gym(["1"], ["1"], "chain_sun", 5)


def test_the_extra_is_named_where_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match='extra "verifiers"'):
        verifiers.reasoning_gym(["1"], ["1"], "chain_sum", 6)
