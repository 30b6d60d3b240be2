"""Rows by number: a pure function of the seed and k, in the proportions that were asked for."""

import itertools
import json
import random

import numpy as np
import pytest

from instar.config import build
from instar.data.dataset import TokenDataset
from instar.data.loader import LoaderConfig, batches
from instar.data.prepare import PrepareConfig, prepare
from instar.data.rows import BLOCK, HeldOutRows, TrainingRows
from instar.errors import UserError

pytestmark = pytest.mark.smoke

S = 12
WORDS = ("red", "green", "blue", "多", "🙂")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    """Two sources, one four times as large as the other, small shards and small records."""
    folder = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    for name, count in (("large", 200), ("small", 50)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                words = " ".join(
                    rng.choices(["red", "green", "blue", "多", "🙂"], k=number % 23 + 1)
                )
                file.write(json.dumps({"text": f"{name} {number} {words}"}) + "\n")
    values = {
        "sources": [
            {"name": n, "kind": "jsonl", "path": str(folder / f"{n}.jsonl")}
            for n in ("large", "small")
        ],
        "tokenizer": {"vocab_size": 330},
        "sequence_lengths": [S],
        "held_out": 0.1,
        "shard_tokens": 700,
        "record_tokens": 7,
    }
    prepare(build(values, PrepareConfig), folder / "data")
    return TokenDataset.open(folder / "data")


def training(dataset: TokenDataset, seed: int = 0, **weights: float) -> TrainingRows:
    return TrainingRows(dataset, sequence_length=S, weights=weights, seed=seed)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_row_holds_what_its_spans_say(dataset):
    source = dataset.sources["large"]
    assert len(source.facts["shards"]) > 2
    index = source.pack_index("train", S)
    rows = training(dataset, large=1.0)
    numbers = np.arange(40)
    batch = rows.rows(numbers)
    _, packed = rows.locate(numbers)
    documents = source.document_tokens(np.arange(len(source.documents.tokens)))
    for k, row in enumerate(packed):
        tokens, targets, weights, positions, segments = [], [], [], [], []
        for number, span in enumerate(range(index.row_offsets[row], index.row_offsets[row + 1])):
            start, length = index.start[span], index.length[span]
            words = documents[index.document[span]][start : start + length].tolist()
            tokens += words
            targets += [*words[1:], None]
            weights += [1.0] * (length - 1) + [0.0]
            positions += range(length)
            segments += [number + 1] * length
        n = min(len(tokens), S)
        assert batch["tokens"][k, :n].tolist() == tokens[:n]
        assert batch["weights"][k, :n].tolist() == weights[:n]
        assert batch["positions"][k, :n].tolist() == positions[:n]
        assert batch["segment_ids"][k, :n].tolist() == segments[:n]
        for column in np.flatnonzero(batch["weights"][k]):
            assert batch["targets"][k, column] == targets[column]
        assert not batch["segment_ids"][k, n:].any() and not batch["weights"][k, n:].any()
    assert {name: a.dtype for name, a in batch.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "weights": np.float32,
    }


def test_documents_begin_and_end_and_read_as_they_were_written(dataset):
    tokenizer = dataset.tokenizer
    for document in dataset.sources["small"].document_tokens([0, 1, 49]):
        assert document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id
    text = tokenizer.decode(dataset.sources["small"].document_tokens([3])[0])
    assert text.startswith("small 3 ")


def test_an_epoch_reads_each_training_row_once_and_no_held_out_document(dataset):
    source = dataset.sources["large"]
    count = source.pack_index("train", S).rows
    rows = training(dataset, large=1.0)
    _, first = rows.locate(np.arange(BLOCK))
    assert count < BLOCK
    # A block draws `count` consecutive numbers of the source's sequence in some order.
    epochs = np.bincount(first, minlength=count)
    assert epochs.min() >= BLOCK // count and epochs.max() <= BLOCK // count + 1
    index = source.pack_index("train", S)
    assert not source.documents.held_out[index.document].any()
    assert source.documents.held_out[source.pack_index("held_out", S).document].all()


def test_row_k_depends_on_the_seed_and_k_alone(dataset):
    rows, numbers = training(dataset), np.asarray([5, 3, 10**15, 3, 0, BLOCK, BLOCK - 1])
    batch = rows.rows(numbers)
    for i, k in enumerate(numbers):
        assert equal({name: a[i : i + 1] for name, a in batch.items()}, training(dataset).rows([k]))
    other = training(dataset, seed=1).rows(np.arange(50))
    assert not equal(rows.rows(np.arange(50)), other)


def test_epochs_differ_in_order(dataset):
    rows = training(dataset, small=1.0)
    count = dataset.sources["small"].pack_index("train", S).rows
    drawn = {}
    for k, row in enumerate(rows.locate(np.arange(2 * BLOCK))[1].tolist()):
        drawn.setdefault(row, []).append(k)
    assert len(drawn) == count


@pytest.mark.parametrize(
    "weights", [{}, {"large": 1.0, "small": 1.0}, {"large": 0.9, "small": 0.1}]
)
def test_a_mixture_has_its_proportions_in_each_block(dataset, weights):
    rows = training(dataset, **weights)
    targets = {n: s.pack_index("train", S).targets for n, s in dataset.sources.items()}
    shares = weights or targets
    for start in (0, 7 * BLOCK):
        which, _ = rows.locate(start + np.arange(BLOCK))
        share = shares["large"] / sum(shares.values())
        assert abs((which == 0).mean() - share) < 2 / BLOCK
    # Within a block the sources are mixed, not one after the other.
    assert 0 < rows.locate(np.arange(64))[0].sum() < 64


def test_epochs_count_what_was_drawn(dataset):
    rows = training(dataset, large=0.7, small=0.3)
    sizes = {n: s.pack_index("train", S).rows for n, s in dataset.sources.items()}
    for count in (0, 1, 100, BLOCK, 2 * BLOCK + 17):
        which, _ = rows.locate(np.arange(count))
        expected = {n: (which == i).sum() / sizes[n] for i, n in enumerate(("large", "small"))}
        assert rows.epochs(count) == pytest.approx(expected)


@pytest.mark.parametrize("weights", [{}, {"large": 0.7, "small": 0.3}])
def test_the_rows_of_epochs_read_each_source_so_often(dataset, weights):
    """Of texts alone all sources count together; `tests/stages/test_sft.py` has dialogues."""
    rows = training(dataset, **weights)
    sizes = {n: s.pack_index("train", S).rows for n, s in dataset.sources.items()}
    read = rows.epochs(rows.rows_of_epochs(200.0))
    total = sum(read[name] * sizes[name] for name in sizes)
    assert total == pytest.approx(200 * sum(sizes.values()), rel=1e-3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"lrage": 1.0}, "lrage"), ({"large": -1.0}, "negative"), ({"large": 0.0}, "nothing")],
)
def test_weights_that_make_no_sense(dataset, weights, message):
    with pytest.raises(UserError, match=message):
        TrainingRows(dataset, sequence_length=S, weights=weights, seed=0)


def test_a_length_that_was_not_packed(dataset):
    with pytest.raises(UserError, match=r"sequence_lengths.*prepare again"):
        TrainingRows(dataset, sequence_length=S + 1, weights={}, seed=0)


def stream(dataset, start_row, steps, processes=1, size=8, threads=2):
    """The batches that `processes` processes read, put together again."""
    parts = []
    for process in range(processes):
        share = size // processes
        offsets = np.arange(process * share, (process + 1) * share)
        loaded = batches(
            training(dataset),
            itertools.repeat(size),
            start_row,
            lambda count, offsets=offsets: offsets,
            LoaderConfig(threads=threads),
        )
        parts.append(list(itertools.islice(loaded, steps)))
    for step in range(steps):
        pieces = [part[step][0] for part in parts]
        assert {(part[step][1], part[step][2]) for part in parts} == {
            (size, start_row + (step + 1) * size)
        }
        yield {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}


def test_processes_threads_and_resuming_do_not_change_the_stream(dataset):
    one = list(stream(dataset, 0, 6))
    assert all(map(equal, one, stream(dataset, 0, 6, processes=4, threads=1)))
    assert all(map(equal, one[4:], stream(dataset, 32, 2, processes=2)))
    assert all(map(equal, one[:3], stream(dataset, 0, 3, size=8, threads=7)))
    wide = list(stream(dataset, 0, 3, size=16))
    assert equal(wide[0], {n: np.concatenate([one[0][n], one[1][n]]) for n in one[0]})


def test_a_growing_batch_moves_the_position_on(dataset):
    loaded = batches(training(dataset), iter([2, 4, 6]), 10, np.arange, LoaderConfig())
    positions = [
        (len(b["tokens"]), count, after) for b, count, after in itertools.islice(loaded, 2)
    ]
    assert positions == [(2, 2, 12), (4, 4, 16)]


def test_held_out_rows_are_read_once_and_padded(dataset):
    held = HeldOutRows(dataset, sequence_length=S, weights={}, batch=7)
    parts = list(held)
    targets = [s.pack_index("held_out", S).targets for s in dataset.sources.values()]
    text = sum(int(s.documents.bytes[s.documents.held_out].sum()) for s in dataset.sources.values())
    assert all(part["tokens"].shape == (7, S) for part in parts)
    assert sum(part["weights"].sum() for part in parts) == sum(targets)
    assert held.tokens_per_byte == pytest.approx(sum(targets) / text)
    assert all(map(equal, parts, held))
    few = list(HeldOutRows(dataset, sequence_length=S, weights={}, batch=2, limit=3))
    assert len(few) == 2 and few[1]["weights"][1].sum() == 0
