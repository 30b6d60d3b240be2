"""A small model in a folder, as a user would have it."""

from pathlib import Path

import numpy as np
import pytest
from interchange_examples import make_model

from instar.interchange.convert import write_hub_folder
from instar.interchange.parameters import flatten


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = make_model("llama"), tmp_path_factory.mktemp("model") / "folder"
    read = flatten(model.params).__getitem__
    write_hub_folder(model.card, lambda path: np.asarray(read(path)), folder, np.dtype("f4"))
    return folder
