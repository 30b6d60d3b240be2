"""Preparation: what it writes, what it refuses, and that an interruption changes nothing."""

import dataclasses
import hashlib
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from instar.config import build, to_dict
from instar.data.dataset import TokenDataset
from instar.data.prepare import PrepareConfig, prepare
from instar.data.rows import HeldOutRows
from instar.data.sources import SourceConfig
from instar.errors import UserError

WORDS = ["red", "green", "blue", "多", "🙂", "  ", "\n", "def f(x):"]


def write_lines(path: pathlib.Path, texts: list) -> pathlib.Path:
    """JSON lines; a text of None becomes a broken line."""
    lines = ["{broken" if text is None else json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [f"{n} " + " ".join(rng.choices(WORDS, k=n % 23 + 1)) for n in range(count)]


def config_of(*paths: pathlib.Path, **fields) -> PrepareConfig:
    """One source for each path, named after its file."""
    values = {
        "sources": [{"name": p.stem, "kind": "jsonl", "path": str(p)} for p in paths],
        "tokenizer": {"vocab_size": 340},
        "sequence_lengths": [16],
        "held_out": 0.1,
    }
    return build(values | fields, PrepareConfig)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- What it writes -----------------------------------------------------------------------------


def test_documents_are_those_of_the_source_in_its_order(tmp_path):
    texts = some_texts(60)
    config = config_of(write_lines(tmp_path / "a.jsonl", texts), shard_tokens=300, record_tokens=9)
    manifest = prepare(config, tmp_path / "data")
    assert json.loads((tmp_path / "data" / "manifest.json").read_text()) == manifest
    dataset = TokenDataset.open(tmp_path / "data")
    assert dataset.chat_template is None
    source = dataset.sources["a"]
    assert len(source.facts["shards"]) > 3
    documents = source.document_tokens(np.arange(len(texts)))
    assert [dataset.tokenizer.decode(document) for document in documents] == texts
    assert max(map(len, documents)) > 3 * config.record_tokens
    assert source.documents.tokens.tolist() == [len(document) for document in documents]
    assert source.documents.bytes.tolist() == [len(text.encode()) for text in texts]
    facts = manifest["sources"]["a"]
    held_out = source.documents.held_out
    for split, chosen in (("train", ~held_out), ("held_out", held_out)):
        assert facts["splits"][split] == {
            "documents": chosen.sum(),
            "tokens": source.documents.tokens[chosen].sum(),
            "bytes": source.documents.bytes[chosen].sum(),
        }
    digests = {"name": "a.jsonl", "sha256": sha256(tmp_path / "a.jsonl")}
    assert facts["files"] == [digests]
    for name, digest in facts["shards"].items():
        assert sha256(tmp_path / "data" / "a" / name) == digest


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_split_is_by_text(tmp_path):
    texts = some_texts(400)
    config = config_of(
        write_lines(tmp_path / "a.jsonl", texts),
        write_lines(tmp_path / "b.jsonl", [*texts[200:], *texts[:200]]),
    )
    prepare(config, tmp_path / "data")
    dataset = TokenDataset.open(tmp_path / "data")
    a, b = (dataset.sources[name].documents.held_out for name in "ab")
    assert a.tolist() == [*b[200:], *b[:200]]
    assert 20 <= a.sum() <= 65
    other = dataclasses.replace(config, seed=1)
    prepare(other, tmp_path / "other")
    assert (
        TokenDataset.open(tmp_path / "other").sources["a"].documents.held_out.tolist() != a.tolist()
    )


def test_the_tokenizer_sees_no_held_out_text_and_all_parts_of_a_source(tmp_path):
    # Sorted as sources often are: a prefix of the bytes would hold only the first kind of text.
    texts = [f"{n} " + "aaaa bbbb " * 5 for n in range(300)]
    texts += [f"{n} " + "yyyy zzzz " * 5 for n in range(300)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    fields = {"tokenizer": {"vocab_size": 310, "train_bytes": 5000}, "held_out": 0.5}
    prepare(config_of(path, **fields), tmp_path / "data")
    tokenizer = TokenDataset.open(tmp_path / "data").tokenizer
    for word in (" bbbb", " zzzz"):
        assert len(tokenizer.encode(word)) < len(word)

    secret = "qqqqqqqqqqqqqqqq" * 50
    for seed in range(20):
        config = config_of(write_lines(tmp_path / "b.jsonl", [*texts, secret]), **fields, seed=seed)
        prepare(config, tmp_path / f"data-{seed}")
        dataset = TokenDataset.open(tmp_path / f"data-{seed}")
        if dataset.sources["b"].documents.held_out[-1]:
            assert len(dataset.tokenizer.encode("qqqq")) == 4
            return
    raise AssertionError("no seed held the text out")


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    vocabulary = {"</s>": 0, "[UNK]": 1} | {f"w{n}": n for n in range(2, 70_000)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [f"w{n} w{69_999 - n}" for n in range(2, 40)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    prepare(
        config_of(path, tokenizer={"path": str(tmp_path / "tokenizer.json")}), tmp_path / "data"
    )
    source = TokenDataset.open(tmp_path / "data").sources["a"]
    documents = source.document_tokens(np.arange(len(texts)))
    assert [d.tolist() for d in documents] == [[0, n, 69_999 - n, 0] for n in range(2, 40)]


# --- What is wrong with a source ----------------------------------------------------------------


def test_broken_records_are_listed_and_left_out(tmp_path, capsys):
    texts = some_texts(50)
    path = write_lines(tmp_path / "a.jsonl", [*texts[:20], None, *texts[20:], "", None])
    manifest = prepare(config_of(path, shard_tokens=200), tmp_path / "data")
    assert manifest["sources"]["a"]["documents"] == 50
    assert manifest["sources"]["a"]["skipped"] == 3
    lines = (tmp_path / "data" / "a" / "skipped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [record["position"] for record in listed] == [20, 51, 52]
    assert {record["file"] for record in listed} == {str(path)}
    assert all(record["reason"] for record in listed)
    told = capsys.readouterr().err
    assert f"the first skipped is record 21 of {path} (line 21 is not JSON" in told
    assert f"all are listed in {tmp_path / 'data' / 'a' / 'skipped.jsonl'}" in told


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([*some_texts(10), *[None] * 11], "11 of 21 records are broken.*JSON"),
        ([None] * 5, r"5 of 5 .* the first is record 1 of .*a\.jsonl \(line 1 is not JSON"),
        ([], "no text|no document"),
    ],
)
def test_a_source_that_is_empty_or_mostly_broken(tmp_path, texts, message):
    path = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=message):
        prepare(config_of(path), tmp_path / "data")
    # Beside a good source as well, and with nothing that reads as a data set.
    good = write_lines(tmp_path / "good.jsonl", some_texts(50))
    with pytest.raises(UserError, match="source a"):
        prepare(config_of(good, path), tmp_path / "both")
    with pytest.raises(UserError, match="is not finished: run instar prepare"):
        TokenDataset.open(tmp_path / "both")


@pytest.mark.parametrize("tokenizer", ["trained", "known"])
def test_a_wrong_field_or_kind_is_told_by_the_first_record(tmp_path, tokenizer):
    fields, good = {}, write_lines(tmp_path / "good.jsonl", some_texts(50))
    if tokenizer == "known":
        prepare(config_of(good), tmp_path / "known")
        fields = {"tokenizer": {"path": str(tmp_path / "known" / "tokenizer")}}
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "body": "x"}\n' * 3)
    message = r"source a: 3 of 3 .*record 1 of .*a\.jsonl \(text is missing; .* 'id', 'body'\): "
    with pytest.raises(UserError, match=message + r"set sources\.1\.field or sources\.1\.kind"):
        prepare(config_of(good, path, **fields), tmp_path / "data")
    path.write_text(json.dumps([{"text": text} for text in some_texts(3)], indent=1))
    with pytest.raises(UserError, match="the file is a JSON list, which is the kind json"):
        prepare(config_of(path, **fields), tmp_path / "list")


def test_a_small_source_of_which_nothing_is_held_out(tmp_path, capsys):
    config = config_of(write_lines(tmp_path / "a.jsonl", some_texts(50)[30:]), held_out=0.001)
    prepare(config, tmp_path / "data")
    told = capsys.readouterr().err
    assert "a: 20 documents to learn from, 0 held out" in told
    # What it says is enough: the rows of held-out documents say so too.
    least = float(re.search(r"holds out none.*set held_out to (\S+) or more", told)[1])
    prepare(dataclasses.replace(config, held_out=least), tmp_path / "other")
    assert "a: 19 documents to learn from, 1 held out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"larger held_out into a new --workdir.*data\.path"):
        dataset = TokenDataset.open(tmp_path / "data")
        HeldOutRows(dataset, sequence_length=16, weights={}, batch=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": []}, "at least one source"),
        ({"sources": [{"name": "a", "kind": "jsonl", "path": "x"}] * 2}, "different names"),
        ({"sequence_lengths": []}, "sequence_lengths"),
        ({"sequence_lengths": [0]}, "sequence_lengths"),
        ({"held_out": 1.0}, "held_out"),
        ({"record_tokens": 0}, "record_tokens"),
    ],
)
def test_configs_that_make_no_sense(fields, message):
    with pytest.raises(UserError, match=message):
        config_of(pathlib.Path("a.jsonl"), **fields)


# --- Again --------------------------------------------------------------------------------------


def test_a_finished_data_set_is_left_as_it_is(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", some_texts(50))
    config, data = config_of(path), tmp_path / "data"
    manifest = prepare(config, data)
    before = files_of(data)
    path.unlink()  # it is no longer needed
    assert prepare(config, data) == manifest
    with pytest.raises(UserError, match=r"another config: held_out \(was 0.1, is 0.2\)"):
        prepare(dataclasses.replace(config, held_out=0.2), data)
    assert files_of(data) == before


def test_what_an_earlier_release_had_no_field_for_is_the_default(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", some_texts(50))
    config, data = config_of(path), tmp_path / "data"
    manifest = prepare(config, data)
    saved = json.loads((data / "config.json").read_text())
    del saved["record_tokens"], saved["tokenizer"]["train_bytes"]
    (data / "config.json").write_text(json.dumps(saved))
    assert prepare(config, data) == manifest
    (data / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"another config: record_tokens \(was 16384, is 7\)"):
        prepare(dataclasses.replace(config, record_tokens=7), data)


def test_a_source_that_does_not_exist_claims_nothing(tmp_path):
    config = config_of(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="absent"):
        prepare(config, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_what_fails_before_its_first_shard_leaves_the_workdir_to_another_config(tmp_path):
    path, data = write_lines(tmp_path / "a.jsonl", some_texts(50)), tmp_path / "data"
    with pytest.raises(UserError, match="give at most"):  # no tokenizer yet
        prepare(config_of(path, tokenizer={"vocab_size": 300_000}), data)
    known = {"path": str(tmp_path / "whole" / "tokenizer")}
    prepare(config_of(path), tmp_path / "whole")
    broken = write_lines(tmp_path / "broken.jsonl", [None] * 5)
    with pytest.raises(UserError, match="5 of 5 records are broken"):  # a tokenizer, of another
        prepare(config_of(broken, tokenizer=known), data)
    assert prepare(config_of(path), data) == prepare(config_of(path), tmp_path / "whole")
    assert files_of(data) == files_of(tmp_path / "whole")


def test_a_run_that_went_on_binds_its_workdir(tmp_path):
    path, data = write_lines(tmp_path / "a.jsonl", some_texts(50)), tmp_path / "data"
    prepare(config_of(path), data)
    (data / "manifest.json").unlink()
    before = files_of(data)
    other = config_of(path, held_out=0.2)
    with pytest.raises(UserError, match=r"another config: held_out \(was 0.1, is 0.2\)"):
        prepare(other, data)
    assert files_of(data) == before
    # Nor is the folder of a training run, with a config of another kind, ever cleared.
    run = tmp_path / "run"
    (run / "a").mkdir(parents=True)
    (run / "a" / "notes").write_text("mine")
    (run / "config.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match="belongs to another config"):
        prepare(other, run)
    assert sorted(files_of(run)) == ["a/notes", "config.json"]


def test_a_file_in_the_place_of_a_folder(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", some_texts(50))
    with pytest.raises(UserError, match=r"a\.jsonl is a file: prepare it .*sources\.0\.path="):
        TokenDataset.open(path)
    with pytest.raises(UserError, match=r"workdir .*a\.jsonl is a file: name a folder"):
        prepare(config_of(path), path)
    with pytest.raises(UserError, match=r"data lies in .*a\.jsonl, which is a file: name a folder"):
        prepare(config_of(path), path / "data")


def test_a_remote_workdir_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"s3://bucket/data: .* local or mounted disk"):
        prepare(config_of(tmp_path / "absent.jsonl"), "s3://bucket/data")


def test_a_source_that_changes_during_an_interruption_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", some_texts(50))
    config, data = config_of(path), tmp_path / "data"
    prepare(config, data)
    (data / "manifest.json").unlink()
    write_lines(path, some_texts(51))
    with pytest.raises(UserError, match="source a have changed"):
        prepare(config, data)
    assert not (data / "manifest.json").exists()


def test_a_changed_tokenizer_or_format_is_refused(tmp_path):
    config = config_of(write_lines(tmp_path / "a.jsonl", some_texts(50)))
    prepare(config, tmp_path / "data")
    prepare(dataclasses.replace(config, held_out=0.5), tmp_path / "other")
    ours, other = (tmp_path / name / "tokenizer" / "tokenizer.model" for name in ("data", "other"))
    assert ours.read_bytes() != other.read_bytes()
    shutil.copy(other, ours)
    with pytest.raises(UserError, match="is not the one that the tokens were made with"):
        TokenDataset.open(tmp_path / "data")
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(UserError, match="prepare it again"):
        TokenDataset.open(tmp_path / "other")
    with pytest.raises(UserError, match="does not exist: run instar prepare"):
        TokenDataset.open(tmp_path / "nowhere")


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    texts = some_texts(40)
    texts[10:10] = [None, "x" * 500]
    config = config_of(write_lines(tmp_path / "a.jsonl", texts), shard_tokens=2500)
    # Dialogues: their targets are one more file of each shard, and some are too long for a row.
    dialogues = tmp_path / "b.json"
    dialogues.write_text(json.dumps([{"instruction": t, "output": t} for t in some_texts(120)]))
    source = SourceConfig("b", "json", str(dialogues), dialogue="alpaca")
    sources = (*config.sources, source)
    config = dataclasses.replace(
        config, sources=sources, chat_template="plain", sequence_lengths=(64,)
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    program = pathlib.Path(__file__).parent / "interrupted.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    whole = files_of(tmp_path / "whole")
    assert "b/targets-00001.npz" in whole
    interrupted = [*tmp_path.glob("change-*"), *tmp_path.glob("clock-*")]
    assert len(interrupted) > 40
    for workdir in interrupted:
        assert files_of(workdir) == whole, workdir.name
