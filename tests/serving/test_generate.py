"""`instar generate`: prompts from wherever they come, a JSON object for each."""

import dataclasses
import io
import json

import numpy as np
import pytest

import instar
from instar import cli
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.interchange.card import ModelCard


@pytest.fixture
def generate(model_folder, capsys, monkeypatch):
    def run(*words: str, stdin: str = "") -> list[dict]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main(["generate", "--model", str(model_folder), "--max_new_tokens=5", *words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return run


def test_the_same_prompts_from_arguments_a_file_and_standard_input(generate, tmp_path):
    prompts = ["the sea", "你好 😀", "wife  and"]
    (tmp_path / "p.txt").write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n")
    records = [{"prompt": prompt} for prompt in prompts]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    first = generate(*prompts)
    assert [line["prompt"] for line in first] == prompts
    assert all(0 < line["tokens"] <= 5 for line in first)
    assert generate("--file", str(tmp_path / "p.txt")) == first
    assert generate("--file", str(tmp_path / "p.jsonl")) == first
    assert generate(stdin="\n".join(prompts)) == first
    assert generate(*prompts, "--batch=1") == first
    assert generate(*prompts, "--seed=1") != first


def test_lines_are_what_the_model_says(generate, model_folder):
    (line,) = generate("the sea", "--temperature=0", "--log_probs=true")
    model = instar.load(model_folder)
    ids = model.encode("the sea")
    assert ids[0] == model.tokenizer.bos_id
    for token, log_prob in zip(line["token_ids"], line["log_probs"], strict=True):
        logits = np.float64(model([ids])[0, -1])
        expected = logits - logits.max()
        expected -= np.log(np.exp(expected).sum())
        assert token == expected.argmax()
        assert log_prob == pytest.approx(expected[token], abs=2e-5)
        ids.append(token)
    assert line["completion"] == model.tokenizer.decode(line["token_ids"])


def test_dialogues(generate, model_folder, tmp_path):
    model = instar.load(model_folder)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}))
    greedy = SamplingConfig(max_new_tokens=5, temperature=0)
    (expected,) = model.generate([messages], sampling=greedy)
    words = ("--temperature=0",)
    (line,) = generate("--file", str(tmp_path / "p.jsonl"), *words)
    assert (line["completion"], line["prompt"]) == (expected.text, messages)
    (line,) = generate("hello", "--chat=true", "--system=be brief", *words)
    assert (line["completion"], line["prompt"]) == (expected.text, "hello")
    (line,) = generate("hello", "--chat=true", "--template=llama2", *words)
    llama2 = model.chat_template("llama2")
    (expected,) = model.generate([messages[1:]], sampling=greedy, template=llama2)
    assert line["completion"] == expected.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no prompt"),
        (("x", "--file=y"), "not from both"),
        (("--file=gone.txt",), "gone.txt cannot be read"),
        (("x", "--temperature=-1"), "temperature must not be negative"),
        (("the sea " * 80,), "no room for a new one in the model's 128 positions"),
        (("x", "--template=gpt9"), "there is no chat template 'gpt9'"),
        (("x", "--batch=0"), "batch must be at least 1"),
        (("x", "--seed=-1"), "seed must be at least 0"),
        (("x", "--stop="), "stop_strings must not be empty"),
    ],
)
def test_mistakes_are_one_sentence(model_folder, capsys, monkeypatch, words, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code = cli.main(["generate", "--model", str(model_folder), *words])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("line", ["{", "3", "{}", '{"prompt": 3}'])
def test_a_line_that_is_no_prompt_is_named(model_folder, capsys, tmp_path, line):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n' + line)
    code = cli.main(["generate", "--model", str(model_folder), "--file", str(tmp_path / "p.jsonl")])
    assert code == 2 and "p.jsonl, line 2" in capsys.readouterr().err


def test_a_model_without_a_template_asks_for_one(model_folder, tmp_path):
    model = instar.load(model_folder)
    bare = dataclasses.replace(model, card=ModelCard(model.spec, model.tokenizer))
    with pytest.raises(UserError, match=r"no chat template of its own: name one.*chatml"):
        bare.generate([[{"role": "user", "content": "x"}]])
    wordless = dataclasses.replace(model, card=ModelCard(model.spec))
    with pytest.raises(UserError, match="came without a tokenizer"):
        wordless.generate(["x"])
    (completion,) = wordless.generate([[1, 2]], sampling=SamplingConfig(max_new_tokens=3))
    assert completion.text is None and len(completion.tokens) == 3
