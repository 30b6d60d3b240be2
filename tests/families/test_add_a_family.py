"""The README's worked example of a new family does what the README says."""

import jax
import numpy as np
import readme_family
from examples import random_params

import instar
from instar.families.registry import ModelConfig, build_spec
from instar.interchange.card import ModelCard
from instar.interchange.convert import write_hub_folder
from instar.interchange.parameters import flatten
from instar.models.language_model import LanguageModel


def test_a_family_of_forty_lines_goes_out_and_comes_back(monkeypatch, tmp_path):
    assert len(readme_family.source().splitlines()) <= 40
    (tmp_path / "families").mkdir()
    readme_family.added(monkeypatch, tmp_path / "families")
    config = ModelConfig("stablelm", depth=3, width=48, heads=6, kv_heads=2)
    model = LanguageModel(build_spec(config, vocab_size=31, max_positions=20))
    params = random_params(model, 0)
    read = flatten(params).__getitem__
    architecture = write_hub_folder(ModelCard(model.spec), read, tmp_path / "out", np.dtype("f4"))
    assert architecture == "StableLmForCausalLM"
    again = instar.load(tmp_path / "out")
    assert again.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
