"""Texts packed into rows: all of them are there, whole and apart."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instar.data.text_rows import pack_texts


@given(st.lists(st.integers(1, 9), max_size=30))
def test_each_text_is_found_where_it_ends(lengths):
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 100, n).tolist() for n in lengths]
    rows = pack_texts(texts, 9)
    assert np.count_nonzero(rows.segment_ids) == sum(lengths)
    flat = {name: x.reshape(-1) for name, x in rows.padded(len(rows) + 1).items()}
    for text, end in zip(texts, rows.ends, strict=True):
        span = slice(end - len(text) + 1, end + 1)
        assert flat["tokens"][span].tolist() == text
        assert flat["positions"][span].tolist() == list(range(len(text)))
        # A segment of its own: no more tokens of its row belong to it.
        row = rows.segment_ids[end // 9]
        assert np.count_nonzero(row == flat["segment_ids"][end]) == len(text)
    # First fit leaves at most one row half empty or more.
    filled = np.count_nonzero(rows.segment_ids, axis=1)
    assert np.count_nonzero(filled * 2 <= 9) <= 1
