"""How launch/local.sh chooses a Python: by running it, for a shim may exist and fail.

tests/test_launch_several.py is about what starts several processes.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "local.sh"
VERSION = f"3.{sys.version_info.minor}"


@pytest.fixture
def machine(tmp_path):
    """A machine whose PATH holds a shell's needs and the programs that a test adds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "dirname", "uname"):
        (folder / name).symlink_to(shutil.which(name))

    def add(name: str, body: str) -> None:
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)

    def local(*words: str, **variables: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("INSTAR_")}
        kept |= {"PATH": str(folder), "PYENV_ROOT": str(tmp_path / "pyenv"), **variables}
        command = [str(folder / "bash"), str(SCRIPT), *words]
        return subprocess.run(command, env=kept, capture_output=True, text=True, check=False)

    local.add = add
    return local


def test_a_shim_that_fails_is_passed_over(machine):
    machine.add("python3.14" if VERSION != "3.14" else "python3.13", "echo not installed; exit 127")
    machine.add(f"python{VERSION}", "exit 1")
    machine.add("python3", f'exec "{sys.executable}" "$@"')
    chosen = machine("which-python")
    assert chosen.returncode == 0, chosen.stderr
    assert chosen.stdout.strip().endswith("/bin/python3")


def test_an_interpreter_without_ensurepip_is_passed_over(machine):
    code = "import sys; sys.modules['ensurepip'] = None; exec(sys.argv[2])"
    machine.add(f"python{VERSION}", f'exec "{sys.executable}" -c "{code}" "$@"')
    machine.add("python", f'exec "{sys.executable}" "$@"')
    assert machine("which-python").stdout.strip().endswith("/bin/python")


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["which-python"], {}, "no working Python 3.11 to 3.14 was found"),
        (["--processes", "two", "instar"], {}, "--processes needs a number, not two"),
        (["--restarts", "2", "chat"], {}, "for commands such as instar, not for 'chat'"),
        (["setup"], {"INSTAR_PYTHON": "/nowhere/python3"}, "INSTAR_PYTHON=/nowhere/python3 is not"),
    ],
)
def test_what_cannot_be_done_is_one_clear_sentence(machine, tmp_path, words, variables, message):
    done = machine(*words, INSTAR_VENV=str(tmp_path / "venv"), **variables)
    assert done.returncode == 1
    assert done.stderr.startswith("local.sh: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()
