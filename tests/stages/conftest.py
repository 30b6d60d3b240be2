"""A small data set and a finished run on it, made once by the real commands."""

import pathlib

import pytest
from runs import instar, prepare_tiny_data, write_run_config


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small data set."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def run_config(tiny_data: pathlib.Path) -> pathlib.Path:
    """The config file of a run on the small data set."""
    return write_run_config(tiny_data)


@pytest.fixture(scope="session")
def finished_run(run_config: pathlib.Path) -> pathlib.Path:
    """The workdir of a run that nothing interrupted."""
    # By a relative path, as one types it.
    folder = run_config.parent
    arguments = ("pretrain", "--config", run_config, "--workdir", "uninterrupted")
    done = instar(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "uninterrupted"
