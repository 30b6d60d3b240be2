"""The pack index: what is in which row, from the lengths of documents alone."""

import collections
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instar.data.packing import PackIndex, pack

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def spans(index: PackIndex) -> list[list[tuple[int, int, int]]]:
    """Each row's (document, start, length)."""
    columns = zip(index.document.tolist(), index.start.tolist(), index.length.tolist(), strict=True)
    every, bounds = list(columns), index.row_offsets.tolist()
    return [every[a:b] for a, b in itertools.pairwise(bounds)]


def predicted(index: PackIndex) -> collections.Counter:
    """How often each token (document, place) is a target."""
    return collections.Counter(
        (document, place)
        for row in spans(index)
        for document, start, length in row
        for place in range(start + 1, start + length)
    )


def every_target(lengths: list[int]) -> collections.Counter:
    return collections.Counter(
        (document, place) for document, n in enumerate(lengths) for place in range(1, n)
    )


@given(lengths=LENGTHS, sequence=st.integers(1, 25))
def test_concat_predicts_each_token_once_and_fills_its_rows(lengths, sequence):
    index = pack(np.arange(len(lengths)), lengths, sequence, "concat")
    rows = spans(index)
    assert predicted(index) == every_target(lengths)
    assert index.targets == sum(n - 1 for n in lengths)
    sizes = [sum(length for *_, length in row) for row in rows]
    assert all(size <= sequence + 1 for size in sizes)
    # Only the last row, and a row with room for one token that predicts nothing, is not full.
    assert all(size >= sequence for size in sizes[:-1])


@given(lengths=LENGTHS, sequence=st.integers(1, 25))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, sequence):
    index = pack(np.arange(len(lengths)), lengths, sequence, "best_fit")
    assert predicted(index) == every_target(lengths)
    for row in spans(index):
        assert 0 < sum(length for *_, length in row) <= sequence + 1
    pieces = collections.Counter(document for row in spans(index) for document, *_ in row)
    for document, n in enumerate(lengths):
        assert pieces[document] == -(-(n - 1) // sequence)


def test_best_fit_wastes_little():
    lengths = np.random.default_rng(0).integers(2, 400, 3000)
    index = pack(np.arange(len(lengths)), lengths, 511, "best_fit")
    assert index.rows <= 1.01 * np.ceil(lengths.sum() / 512)


def test_documents_keep_their_numbers_and_lone_tokens_are_left_out():
    index = pack(np.asarray([7, 3, 9]), np.asarray([4, 1, 2]), 5, "concat")
    assert spans(index) == [[(7, 0, 4), (9, 0, 2)]]
