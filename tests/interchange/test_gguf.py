"""GGUF files, written by the format's own library, against the arrays that went into them."""

from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from interchange_examples import make_model

import instar
from instar.errors import UserError
from instar.families.registry import FAMILIES
from instar.interchange.gguf_file import open_gguf
from instar.interchange.model import Model
from instar.interchange.parameters import flatten, tensors_to_write

TOKENS = np.random.default_rng(0).integers(0, 340, (2, 9))


def write_tensors(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(model: Model, name: str, path: Path, **changes: object) -> Path:
    """A file with the metadata and the tensors that llama.cpp's converter writes."""
    family = FAMILIES[name]
    form, config = family.gguf, family.hub.write_config(model.spec)
    fields = {theirs: config[ours] for ours, theirs in form.fields.items()} | changes
    writer = gguf.GGUFWriter(path, fields.pop("architecture", form.architecture))
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{form.architecture}.{key}", value)
    parameters = flatten(model.params)
    for tensor_name, array in tensors_to_write(form.layout, model.spec, parameters.__getitem__):
        writer.add_tensor(tensor_name, np.ascontiguousarray(array))
    write_tensors(writer)
    return path


@pytest.mark.parametrize("name", ["llama", "gpt3"])
def test_a_file_is_the_model_that_was_written(name, tmp_path):
    model = make_model(name)
    found = instar.load(write_gguf(model, name, tmp_path / "m.gguf"))
    assert found.spec == model.spec
    pairs = zip(jax.tree.leaves(found.params), jax.tree.leaves(model.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    np.testing.assert_array_equal(found(TOKENS), model(TOKENS))
    assert found.tokenizer is None


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "BF16", "F16"])
def test_quantised_tensors_are_what_the_format_s_library_makes_of_them(kind, tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", packed, raw_dtype=kind)
    write_tensors(writer)
    stored = open_gguf(tmp_path / "m.gguf")[1]["x"]
    assert stored.shape == (4, 64)
    np.testing.assert_array_equal(stored.read(), gguf.quants.dequantize(packed, kind))
    np.testing.assert_allclose(stored.read(), values, atol=0.4)


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -100])
def test_a_truncated_file_is_a_sentence(tmp_path, keep):
    path = write_gguf(make_model("llama"), "llama", tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.gguf is truncated, or no GGUF file"):
        instar.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "rwkv"},
            "'rwkv'; those that can be read are gpt2, llama",
        ),
        ({"embedding_length": None}, "hidden_size is missing"),
        ({"rope.scaling.type": "yarn"}, "m.gguf: rope.scaling.type 'yarn' is not supported"),
        ({"rope.dimension_count": 4}, "rope.dimension_count 4 is not the 10 of a head"),
        ({"feed_forward_length": 30}, r"ffn_gate.weight has the shape \[29, 24\]"),
    ],
)
def test_metadata_that_does_not_fit_is_a_sentence(tmp_path, changes, message):
    path = write_gguf(make_model("llama"), "llama", tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=message):
        instar.load(path)


def test_scaling_that_the_file_states_is_read(tmp_path):
    changes = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = write_gguf(make_model("llama"), "llama", tmp_path / "m.gguf", **changes)
    assert instar.load(path).spec.each_layer()[0].mixer.rotary.scaling.factor == 4.0
