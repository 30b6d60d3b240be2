"""Prompts: what is read, what is left out, and the order in which a run meets them."""

import json
import pathlib

import numpy as np
import pytest
from tokenizer_examples import corpus

from instar.data.chat import ChatTemplate
from instar.data.completions import CompletionEncoder
from instar.data.prompts import PromptSet
from instar.data.tokenizer import TokenizerConfig, train_tokenizer
from instar.errors import UserError

TOKENIZER = train_tokenizer(corpus(), TokenizerConfig(vocab_size=330))
ENCODER = CompletionEncoder(TOKENIZER, ChatTemplate.named("chatml"), begin=[TOKENIZER.bos_id])
P = 40


def written(path: pathlib.Path, *records: object) -> pathlib.Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_are_what_stands_before_the_assistant(tmp_path):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "the film"}]
    path = written(
        tmp_path / "a.jsonl",
        {"prompt": "the film", "answer": 5},
        {"prompt": "good " * P},
        {"question": "x"},
        {"prompt": messages},
    )
    prompts = PromptSet.open(path, ENCODER, P)
    assert prompts.prompts == ["the film", messages] and len(prompts) == 2
    assert prompts.records[0]["answer"] == 5
    assert prompts.facts == {"records": 4, "skipped": 1, "too_long": 1, "prompts": 2}
    assert prompts.skipped[0] == {"file": str(path), "position": 2, "reason": "prompt is missing"}
    assert prompts.tokens.shape == (2, P)
    assert prompts.tokens.dtype == prompts.lengths.dtype == np.int32
    for row, length, prompt in zip(prompts.tokens, prompts.lengths, prompts.prompts, strict=True):
        assert row[:length].tolist() == ENCODER.prompt(prompt) and not row[length:].any()
    with pytest.raises(UserError, match=r"ppo\.prompts .*none of its 3 prompts fits into 2 tokens"):
        PromptSet.open(path, ENCODER, 2, field="ppo.prompts")


def test_a_prompt_of_no_tokens_is_broken(tmp_path):
    """Nothing can go on from it; where something stands before it, it is a prompt like others."""
    path = written(tmp_path / "a.jsonl", {"prompt": "the film"}, {"prompt": ""}, {"prompt": "good"})
    bare = CompletionEncoder(TOKENIZER, ChatTemplate.named("plain"))
    prompts = PromptSet.open(path, bare, P)
    assert prompts.prompts == ["the film", "good"] and prompts.lengths.min() > 0
    (skipped,) = prompts.skipped
    assert skipped["position"] == 1 and skipped["reason"].startswith("prompt is empty")
    begun = CompletionEncoder(TOKENIZER, ChatTemplate.named("plain"), begin=[TOKENIZER.bos_id])
    assert PromptSet.open(path, begun, P).prompts == ["the film", "", "good"]


def test_each_epoch_has_every_prompt_once_in_its_own_order(tmp_path):
    path = written(tmp_path / "a.jsonl", *({"prompt": f"film {i}"} for i in range(13)))
    prompts = PromptSet.open(path, ENCODER, P)
    run = prompts.batch(seed=5, first=0, count=39)
    assert run.dtype == np.int64
    epochs = run.reshape(3, 13)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(13), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    parts = [prompts.batch(5, first, 3) for first in range(0, 39, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), run)
    assert not np.array_equal(prompts.batch(6, 0, 39), run)
    assert prompts.digest == PromptSet.open(path, ENCODER, P + 1).digest
    written(path, *({"prompt": f"film {i}"} for i in range(12)))
    assert prompts.digest != PromptSet.open(path, ENCODER, P).digest
