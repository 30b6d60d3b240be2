"""Tiny models that transformers does not have, against the logits of their own code."""

import pathlib

import jax
import numpy as np
import pytest

import instar
from instar.interchange.convert import ExportOptions, ImportOptions, export_model, import_model

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_its_own_code(name):
    reference = np.load(GOLDENS / name / "ref.npz")
    logits = np.asarray(instar.load(GOLDENS / name)(reference["ids"]))
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_bit_for_bit(name, tmp_path):
    import_model(ImportOptions(from_=str(GOLDENS / name), to=str(tmp_path / "ours")))
    export_model(ExportOptions(checkpoint=str(tmp_path / "ours"), to=str(tmp_path / "back")))
    before, after = instar.load(GOLDENS / name), instar.load(tmp_path / "back")
    assert after.spec == before.spec
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
