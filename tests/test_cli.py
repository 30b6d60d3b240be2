"""The command line: what reaches a command, and how each way of failing looks from outside."""

import subprocess
import sys

import pytest

from instar import cli

COUNTER = '''
from dataclasses import dataclass, field
from instar.errors import RestartError, RunError, UserError

@dataclass(frozen=True)
class Rate:
    """How fast."""
    value: float = 0.5

@dataclass(frozen=True)
class CountConfig:
    """What to count."""
    steps: int
    label: str = "x"
    rates: tuple[Rate, ...] = ()
    rate: Rate = Rate(2.0)
    named: dict[str, Rate] = field(default_factory=dict)

def count(config, workdir):
    print(f"{workdir}: {config}")
    if config.label == "run":
        raise RunError("the disk is full")
    if config.label == "alone":
        raise RestartError("process 1 did not come")
    if config.label == "stop":
        raise SystemExit(143)
    if config.label == "bug":
        raise ValueError("a bug")

@dataclass(frozen=True)
class SayOptions:
    """What to say."""
    to: str
    words: tuple[str, ...] = field(default=(), metadata={"positional": True})
    from_: str | None = None
    times: int = 1
    very_loud: bool = False
    stop: tuple[str, ...] = ()
    changes: tuple[tuple[str, str], ...] = field(default=(), metadata={"overrides": True})

def say(options):
    print(options)
'''


@pytest.fixture
def instar(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process with a command `count`; gives (code, out, err)."""
    (tmp_path / "counter_for_cli_tests.py").write_text(COUNTER)
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'steps': 3})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = "counter_for_cli_tests"
    commands = {
        "count": cli.Command("counts", f"{module}:count", f"{module}:CountConfig"),
        "say": cli.Command("says", f"{module}:say", options=f"{module}:SayOptions"),
    }
    monkeypatch.setattr(cli, "COMMANDS", commands)

    def run(*words: str) -> tuple[int, str, str]:
        words = [str(config) if word == "CONFIG" else word for word in words]
        code = cli.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    sys.modules.pop(module, None)


def test_a_command_gets_its_config_with_overrides_in_both_spellings_and_its_folder(instar):
    code, out, err = instar(
        *("count", "--workdir=runs/a", "--config", "CONFIG"),
        *("--config.label", "a=b", "--config.rate.value=-1"),
    )
    assert (code, err) == (0, "")
    assert out.startswith("runs/a: CountConfig(steps=3, label='a=b'")
    assert "rate=Rate(value=-1.0)" in out


def test_a_command_with_options_gets_them_and_the_words_beside_them(instar):
    words = ["say", "a b", "--to=me", "--times", "2", "--stop", "x=1", "--stop=y", "--", "--c"]
    code, out, err = instar(*words)
    assert (code, err) == (0, "")
    assert out == (
        "SayOptions(to='me', words=('a b', '--c'), from_=None, times=2, very_loud=False, "
        "stop=('x=1', 'y'), changes=())\n"
    )
    out = instar("say", "--to=me", "--config.a-b.c=1", "--config.x", "y=2")[1]
    assert "changes=(('a-b.c', '1'), ('x', 'y=2'))" in out
    for words in ["--very_loud", "hi"], ["hi", "--very-loud"], ["--very_loud=true", "hi"]:
        assert (
            "words=('hi',), from_=None, times=1, very_loud=True"
            in instar("say", "--to=me", *words)[1]
        )
    assert "very_loud=False" in instar("say", "--to=me", "--very-loud=false")[1]
    assert "from_='you'" in instar("say", "--to=me", "--from=you")[1]
    assert "times=1" in instar("say", "--to", "me")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command is needed: count, say"),
        (["cuont"], "did you mean 'count'?"),
        (["dig"], "the commands are count, say"),
        (["count"], "--config is missing"),
        (["count", "--config.steps=4", "--workdir", "w"], "--config is missing"),
        (["count", "--config", "CONFIG"], "--workdir is missing"),
        (["count", "--config"], "--config needs a value"),
        (
            ["count", "--config", "CONFIG", "--config.steps", "--workdir", "w"],
            "--config.steps needs",
        ),
        (["count", "--config", "CONFIG", "--wokdir", "w"], "did you mean '--workdir'?"),
        (["count", "CONFIG"], "is not an option"),
        (["count", "--config", "none.py", "--workdir", "w"], "none.py does not exist"),
        (["count", "--config", "CONFIG", "--workdir", "w", "--config.stpes=1"], "mean 'steps'?"),
        (["count", "--config", "CONFIG", "--workdir", "w", "--config.=1"], "no such field"),
        (["say", "hello"], "--to is missing (str)"),
        (["say", "--very_loud", "--to"], "--to needs a value"),
        (["say", "--to=me", "--tmes=2"], "did you mean '--times'?"),
        (["say", "--to=me", "--times=x"], "--times: expected int, got 'x'"),
        (["say", "--to=me", "--from_=you"], "no option '--from_'"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(instar, words, message):
    code, out, err = instar(*words)
    assert (code, out) == (2, "")
    assert err.startswith("instar: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_how_a_run_ends_is_told_by_its_exit_code(instar):
    words = ["count", "--config", "CONFIG", "--workdir", "w"]
    code, _, err = instar(*words, "--config.label=run")
    assert (code, err) == (1, "instar: error: the disk is full\n")
    code, _, err = instar(*words, "--config.label=alone")
    assert (code, err) == (75, "instar: error: process 1 did not come\n")
    with pytest.raises(SystemExit) as stopped:
        instar(*words, "--config.label=stop")
    assert stopped.value.code == 143
    with pytest.raises(ValueError, match="a bug"):  # a traceback is what a bug should leave
        instar(*words, "--config.label=bug")


def test_help_lists_every_field_with_type_and_default(instar):
    code, out, _ = instar("count", "--help")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["steps", "int", "required"] in lines
    assert ["label", "str", "'x'"] in lines
    assert ["rates", "list", "of", "Rate", "[]"] in lines
    assert ["rates.0.value", "float", "0.5"] in lines
    assert ["named.NAME.value", "float", "0.5"] in lines
    assert ["rate.value", "float", "2.0"] in lines  # the default instance's, not the class's
    assert "  How fast." in out.splitlines()


@pytest.mark.smoke
def test_the_real_commands_exist():
    """Every line of the table leads to a function and to a schema that help can describe."""
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        assert callable(cli.resolve(cli.COMMANDS[name].function))


@pytest.mark.smoke
def test_a_wrong_key_ends_the_real_process_with_one_sentence(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'optimizer': {'learing_rate': 1e-3}})\n"
    )
    words = [sys.executable, "-m", "instar", "pretrain", "--config", str(path)]
    done = subprocess.run(
        [*words, "--workdir", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "instar: error: optimizer.learing_rate: there is no such field; "
        "did you mean 'optimizer.learning_rate'?\n"
    )
    assert not (tmp_path / "run").exists()
