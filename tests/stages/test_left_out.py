"""What was left out of a file is told where there is any, and once."""

import json

import jax
from tokenizer_examples import corpus

from instar.config import build
from instar.data.chat import ChatTemplate
from instar.data.completions import CompletionEncoder
from instar.data.preferences import Comparisons, PreferenceConfig
from instar.data.tokenizer import TokenizerConfig, train_tokenizer
from instar.stages.left_out import tell_left_out

TOKENIZER = train_tokenizer(corpus(), TokenizerConfig(vocab_size=330))
ENCODER = CompletionEncoder(TOKENIZER, ChatTemplate.named("plain"))


def told(path, lines, kind, capsys) -> list[str]:
    path.write_text("\n".join(map(json.dumps, lines)))
    values = {"path": str(path), "kind": kind, "completions": 4, "max_length": 16}
    comparisons = Comparisons.open(build(values, PreferenceConfig), ENCODER)
    tell_left_out("data", comparisons.facts, comparisons.skipped)
    return capsys.readouterr().err.splitlines()


def test_counts_and_the_first_broken_records(tmp_path, capsys):
    pairs = [{"prompt": f"film {i}", "chosen": " good", "rejected": " bad"} for i in range(11)]
    assert told(tmp_path / "whole.jsonl", pairs, "pairs", capsys) == []
    for index in range(1, 10, 2):
        del pairs[index]["rejected"]
    path = tmp_path / "pairs.jsonl"
    first, *others = told(path, pairs, "pairs", capsys)
    assert first.startswith("data: 11 records, 6 groups, 12 completions, ")
    assert first.endswith(" tokens; left out: 5 records broken")
    assert others == [f"  record {n} of {path} (rejected is missing)" for n in (2, 4, 6)]


def test_each_reason_has_its_words(tmp_path, capsys):
    said = {"long": " good" * 16, "good": " good", "bad": " bad"}
    lines = [
        {"prompt": "film", "completions": [said[word] for word in words], "ranks": ranks}
        for words, ranks in (
            (("good", "bad", "long"), (0, 1, 2)),
            (("good", "long"), (0, 1)),
            (("good",), (0,)),
            (("good", "bad"), (1, 1)),
        )
    ]
    (line,) = told(tmp_path / "a.jsonl", lines, "rankings", capsys)
    assert line.startswith("data: 4 records, 1 group, 2 completions, ")
    assert line.endswith(
        "left out: 2 texts too long, 2 groups of fewer than two texts, 1 group of nothing but ties"
    )


def test_one_of_several_processes_says_it(monkeypatch, capsys):
    facts = {"records": 2, "skipped": 1, "prompts": 1}
    broken = [{"file": "a.jsonl", "position": 0, "reason": "prompt is missing"}]
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        tell_left_out("prompts", facts, broken)
    assert capsys.readouterr().err.count("left out") == 1
