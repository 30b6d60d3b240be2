"""Models in and out by the real commands: nothing is lost, and what is wrong is named."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from examples import telling
from interchange_examples import SPECS, TEXTS, make_model
from tokenizer_examples import chat_tokenizer

import instar
from instar import cli
from instar.data.chat import ChatTemplate, encode_chat, stop_ids
from instar.errors import UserError
from instar.interchange import safetensors
from instar.interchange.convert import write_hub_folder
from instar.interchange.model import Model
from instar.interchange.parameters import flatten
from instar.sharding.mesh import MeshConfig, make_mesh

# Orbax reads several arrays at once, and nobody asks for the second error that damage causes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.smoke,
]

TOKENS = np.random.default_rng(0).integers(0, 340, (2, 9))


def write_folder(model: Model, folder: Path) -> Path:
    read = flatten(model.params).__getitem__
    write_hub_folder(model.card, lambda path: np.asarray(read(path)), folder, np.dtype("f4"))
    return folder


def same_bits(a: dict, b: dict) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def run(capsys, *words: object) -> tuple[int, str]:
    code = cli.main([str(word) for word in words])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", telling(SPECS, ("gpt3", "llama, of an odd width", "mixtral")))
def test_in_and_out_and_in_again_is_the_same_model_bit_for_bit(name, tmp_path, capsys):
    model = make_model(name)
    write_folder(model, tmp_path / "folder")
    assert run(capsys, "import", "--from", tmp_path / "folder", "--to", tmp_path / "ours")[0] == 0
    words = ("export", "--checkpoint", tmp_path / "ours", "--to", tmp_path / "back")
    assert run(capsys, *words)[0] == 0
    for place in ("folder", "ours", "ours/checkpoints/0", "back"):
        again = instar.load(tmp_path / place)
        assert same_bits(again.params, model.params), place
        assert again.spec == model.spec
        assert again.card.chat_template == model.card.chat_template
        assert again.card.stop_ids == model.card.stop_ids
        assert [again.tokenizer.encode(t) for t in TEXTS] == [
            model.tokenizer.encode(t) for t in TEXTS
        ]
        np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", ["chatglm", "chatglm3", "moss", "baichuan2"])
def test_a_named_template_and_its_tokens_go_with_a_folder(name, tmp_path):
    tokenizer, template = chat_tokenizer(), ChatTemplate.named(name)
    model = make_model("gpt3")
    card = dataclasses.replace(model.card, tokenizer=tokenizer, chat_template=template.source)
    write_folder(dataclasses.replace(model, card=card), tmp_path / "folder")
    written = json.loads((tmp_path / "folder/tokenizer_config.json").read_text())
    assert written["chat_template"] == template.source
    again = instar.load(tmp_path / "folder")
    turns = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
    messages = [*turns, turns[0]]
    prompt = encode_chat(tokenizer, template, messages, add_generation_prompt=True)
    assert again.request(messages).prompt == prompt
    assert set(stop_ids(tokenizer, template)) - set(again.request(messages).stop_ids) <= {
        tokenizer.special_tokens[name] for name in template.stop_tokens
    }


def test_logits_are_float32_whatever_the_parameters_are(tmp_path):
    model = make_model("llama")
    folder = write_folder(model, tmp_path / "folder")
    half = instar.load(folder, dtype="bfloat16")
    logits = half(TOKENS)
    assert (logits.dtype, logits.shape) == (np.float32, (*TOKENS.shape, model.spec.vocab_size))
    assert jax.tree.leaves(half.params)[0].dtype == jax.numpy.bfloat16
    difference = np.abs(np.asarray(logits - model(TOKENS))).max()
    assert 0 < difference < 0.3


def test_a_model_is_read_straight_onto_a_mesh(tmp_path):
    model = make_model("qwen3")
    folder = write_folder(model, tmp_path / "folder")
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    sharded = instar.load(folder, mesh=mesh)
    kernel = sharded.params["group_0"]["layer_0"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} != {kernel.shape}
    assert same_bits(sharded.params, model.params)
    np.testing.assert_allclose(sharded(TOKENS), model(TOKENS), atol=1e-4)


# --- What is wrong ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(make_model("llama"), tmp_path / "folder")


def refused(folder: Path, capsys, target: Path | None = None) -> str:
    """What the import says; it must leave nothing behind."""
    target = target or folder.parent / "ours"
    code, err = run(capsys, "import", "--from", folder, "--to", target)
    assert code == 2 and err.startswith("instar: error: ") and err.count("\n") == 1, err
    assert not target.exists()
    return err


def change_tensors(folder: Path, change) -> None:
    """Writes the tensors again after `change` had its way with the dict of them."""
    found = safetensors.open_folder(folder)
    arrays = {name: np.array(stored.read()) for name, stored in found.items()}
    change(arrays)
    (folder / safetensors.SINGLE).unlink()
    shapes = {name: array.shape for name, array in arrays.items()}
    writer = safetensors.FolderWriter(folder, shapes, np.dtype("f4"))
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close()


def test_a_missing_tensor(folder, capsys):
    change_tensors(folder, lambda arrays: arrays.pop("model.layers.1.self_attn.k_proj.weight"))
    assert "lacks the tensor model.layers.1.self_attn.k_proj.weight" in refused(folder, capsys)


def test_a_surplus_tensor(folder, capsys):
    change_tensors(folder, lambda arrays: arrays.update({"model.adapter": np.ones(3, "f4")}))
    assert "holds the tensor model.adapter" in refused(folder, capsys)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path, capsys):
    model = make_model("deepseek_v3")
    folder = write_folder(model, tmp_path / "folder")

    def further(arrays: dict) -> None:
        for name in list(arrays):
            if name.startswith("model.layers.2."):
                arrays[name.replace(".2.", ".3.")] = arrays[name]
        arrays["model.layers.3.eh_proj.weight"] = np.ones((24, 48), "f4")
        arrays["model.layers.3.shared_head.norm.weight"] = np.ones(24, "f4")

    change_tensors(folder, further)
    assert same_bits(instar.load(folder).params, model.params)
    # A layer more than the config says is something else.
    change_tensors(folder, lambda arrays: arrays.pop("model.layers.3.eh_proj.weight"))
    assert "holds the tensor model.layers.3." in refused(folder, capsys)


def test_quantised_weights(folder, capsys):
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config.write_text(json.dumps(fields | {"quantization_config": quantised}))
    message = "config.json: quantization_config says that the weights are quantised (fp8)"
    assert message in refused(folder, capsys)


def test_a_tensor_of_another_shape(folder, capsys):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda arrays: arrays.update({name: arrays[name].T}))
    assert f"{name} has the shape [24, 29]" in refused(folder, capsys)


def test_tensors_of_a_bare_model_lack_its_prefix(folder):
    """As `LlamaModel.save_pretrained` writes them."""
    model = instar.load(folder)

    def bare(arrays: dict) -> None:
        for name in list(arrays):
            arrays[name.removeprefix("model.")] = arrays.pop(name)

    change_tensors(folder, bare)
    assert same_bits(instar.load(folder).params, model.params)


def test_a_truncated_file(folder, capsys):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    assert "model.safetensors is truncated" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "rwkv"},
            "model_type 'rwkv' is none of those that can be read: baichuan, bloom",
        ),
        ({"model_type": ["llama"]}, "model_type ['llama'] is none"),
        ({"model_type": None}, "folder holds no model: its config.json has no model_type; name a"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 4}, "heads (6) must be a multiple of kv_heads (4)"),
        ({"head_dim": 5}, "rotary positions need an even number"),
    ],
)
def test_a_config_that_is_wrong(folder, capsys, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert message in refused(folder, capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_config_that_is_no_mapping(folder, capsys, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder, capsys)


def test_a_chat_template_that_cannot_be_read(folder, capsys):
    config = folder / "tokenizer_config.json"
    several = json.loads(config.read_text()) | {"chat_template": ["x", {"name": "tools"}]}
    config.write_text(json.dumps(several))
    assert instar.load(folder).card.chat_template is None, "there is none by the name of default"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja is not UTF-8" in refused(folder, capsys)


def test_pickles_are_not_opened(folder, capsys):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickles only (pytorch_model.bin)" in refused(folder, capsys)
    code, err = run(capsys, "import", "--from", folder / "pytorch_model.bin", "--to", folder / "x")
    assert code == 2 and "is a pickle" in err


def test_what_is_nothing_of_ours(tmp_path, capsys):
    with pytest.raises(UserError, match="gone does not exist: name a run's folder"):
        instar.load(tmp_path / "gone")
    with pytest.raises(UserError, match=r"holds no model: it has no config\.json; name a run's"):
        instar.load(tmp_path)
    code, err = run(capsys, "export", "--checkpoint", tmp_path, "--to", tmp_path / "x")
    assert code == 2 and "is no checkpoint" in err
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        instar.load(tmp_path)


def test_nothing_is_overwritten(folder, capsys):
    code, err = run(capsys, "import", "--from", folder, "--to", folder)
    assert code == 2 and "is there already and not empty" in err
    assert instar.load(folder).spec == SPECS["llama"]


def test_a_checkpoint_whose_parameters_changed_is_refused(folder, capsys):
    ours = folder.parent / "ours"
    assert run(capsys, "import", "--from", folder, "--to", ours)[0] == 0
    assert "is a checkpoint already" in refused(ours, capsys, folder.parent / "twice")
    lineage = ours / "checkpoints/0/lineage/lineage.json"
    lineage.write_text(lineage.read_text().replace('"params": "', '"params": "0'))
    with pytest.raises(UserError, match="are not those that were saved"):
        instar.load(ours)
    shutil.rmtree(ours / "checkpoints/0/params/d")
    with pytest.raises(UserError, match="cannot be read"):
        instar.load(ours)


def test_a_model_that_transformers_has_not_is_refused(tmp_path):
    model = make_model("gpt3")
    card = dataclasses.replace(model.card, spec=model.spec.replace(final_norm=None))
    with pytest.raises(UserError, match="no model of transformers that can be written"):
        write_hub_folder(card, lambda path: None, tmp_path / "x", np.dtype("f4"))
    assert not (tmp_path / "x").exists()


def killed_when(function: str, *words: object) -> None:
    """Runs the command in a process that ends, as by SIGKILL, when it calls `function`."""
    program = (
        f"import os, sys; from instar.interchange import convert; "
        f"convert.{function} = lambda *arguments: os._exit(9); from instar import cli; "
        f"cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr


def test_what_is_killed_leaves_nothing_that_reads_as_whole_and_can_be_tried_again(folder, capsys):
    ours, back = folder.parent / "ours", folder.parent / "back"
    importing = ("import", "--from", folder, "--to", ours)
    killed_when("combine", *importing)
    assert not ours.exists()
    assert run(capsys, *importing)[0] == 0
    exporting = ("export", "--checkpoint", ours, "--to", back)
    killed_when("_write_configs", *exporting)
    assert not back.exists()
    assert run(capsys, *exporting)[0] == 0
    assert same_bits(instar.load(back).params, instar.load(folder).params)
    assert not list(folder.parent.glob("*.partial"))


def test_a_target_that_cannot_be_written(folder, capsys):
    (folder.parent / "file").write_text("")
    target = folder.parent / "file" / "ours"
    code, err = run(capsys, "import", "--from", folder, "--to", target)
    assert code == 2 and "cannot be written" in err
