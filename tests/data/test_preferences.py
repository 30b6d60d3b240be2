"""Comparisons and rated texts: what the files say, what is left out, and the order of a run."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from tokenizer_examples import corpus

from instar.config import build
from instar.data.chat import ChatTemplate
from instar.data.completions import CompletionEncoder
from instar.data.preferences import Comparisons, PreferenceConfig
from instar.data.prompts import PromptSet
from instar.data.rated_texts import RatedTexts
from instar.data.tokenizer import TokenizerConfig, train_tokenizer
from instar.errors import UserError

TOKENIZER = train_tokenizer(corpus(), TokenizerConfig(vocab_size=330))
ENCODER = CompletionEncoder(TOKENIZER, ChatTemplate.named("plain"), begin=[TOKENIZER.bos_id])
T = 24


def write(path: pathlib.Path, *lines: object) -> pathlib.Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def opened(path: pathlib.Path, kind: str, completions: int = 2, **fields) -> Comparisons:
    values = {"path": str(path), "kind": kind, "completions": completions, "max_length": T}
    return Comparisons.open(build(values | fields, PreferenceConfig), ENCODER)


def ranking(number: int, completions: int = 3) -> dict:
    return {
        "prompt": f"film {number}",
        "completions": [f" was {index}" for index in range(completions)],
        "ranks": list(range(completions)),
    }


def rating(prompt: str, completion: str, value: float, **more) -> dict:
    return {"prompt": prompt, "completion": completion, "rating": value, **more}


def texts(batch: dict, row: int) -> list[str]:
    """The compared texts of one group, without padding."""
    rows = zip(batch["tokens"][row], batch["lengths"][row], batch["mask"][row], strict=True)
    return [TOKENIZER.decode(ids[:length].tolist()) for ids, length, real in rows if real]


def test_a_ranking_keeps_texts_and_ranks_together(tmp_path):
    record = {"prompt": "film", "completions": [" a", " bb", " ccc"], "ranks": [2, 1, 1.5]}
    comparisons = opened(write(tmp_path / "a.jsonl", record), "rankings", completions=5)
    batch = comparisons.batch(seed=0, first_group=0, count=1)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((1, 5, T), "int32"),
        "lengths": ((1, 5), "int32"),
        "ranks": ((1, 5), "float32"),
        "mask": ((1, 5), "bool"),
    }
    assert texts(batch, 0) == ["film a", "film bb", "film ccc"]
    assert batch["ranks"][0].tolist() == [2, 1, 1.5, 0, 0]
    assert batch["mask"][0].tolist() == [True] * 3 + [False] * 2
    for index, completion in enumerate(record["completions"]):
        whole = ENCODER.whole("film", completion)
        assert batch["tokens"][0, index].tolist() == whole + [0] * (T - len(whole))
        assert batch["lengths"][0, index] == len(whole)
    assert (batch["lengths"][0, 3:] == 1).all() and not batch["tokens"][0, 3:].any()


def test_the_chosen_of_a_pair_ranks_before_the_rejected(tmp_path):
    pair = {"prompt": "film", "chosen": " good", "rejected": " bad"}
    batch = opened(write(tmp_path / "a.jsonl", pair), "pairs").batch(0, 0, 1)
    ranks = dict(zip(texts(batch, 0), batch["ranks"][0].tolist(), strict=True))
    assert ranks["film good"] < ranks["film bad"]


def test_more_ratings_are_brought_to_the_scale_of_the_first(tmp_path):
    first, second = np.asarray([-3.0, 0.5, 4.0]), np.asarray([1.0, -1.0, -1.0, 1.0, 1.0])
    files = [
        write(tmp_path / name, *(rating("film", f" {name}{i}", x) for i, x in enumerate(values)))
        for name, values in (("a.jsonl", first), ("b.jsonl", second))
    ]
    both = opened(files[0], "ratings", completions=8, group="any", extra=str(files[1]))
    alone = opened(files[0], "ratings", completions=8, group="any")
    batch = both.batch(0, 0, 1)
    ranks = dict(zip(texts(batch, 0), -batch["ranks"][0].astype(np.float64), strict=False))
    moved = np.asarray([ranks[f"film b.jsonl{i}"] for i in range(5)])
    np.testing.assert_allclose([ranks[f"film a.jsonl{i}"] for i in range(3)], first)
    np.testing.assert_allclose([moved.mean(), moved.std()], [first.mean(), first.std()], rtol=1e-6)
    np.testing.assert_allclose(np.corrcoef(moved, second)[0, 1], 1)
    assert both.digest != alone.digest and both.facts["records"] == 8
    thrice = opened(files[0], "ratings", completions=14, group="any", extra=str(files[1]), repeat=3)
    assert sorted(texts(thrice.batch(0, 0, 1), 0)) == sorted(
        [f"film a.jsonl{i}" for i in range(3)] * 3 + [f"film b.jsonl{i}" for i in range(5)]
    )


def test_ratings_of_one_prompt_are_compared(tmp_path):
    as_messages = [{"role": "user", "content": "film", "name": "ann"}]
    path = write(
        tmp_path / "a.jsonl",
        rating("film", " good", 3),
        rating("other", " fair", 1),
        rating(as_messages, " bad", -2.5),
    )
    comparisons = opened(path, "ratings")
    assert (len(comparisons), comparisons.facts["too_small"]) == (1, 1)
    batch = comparisons.batch(0, 0, 1)
    assert texts(batch, 0) == ["film good", "film bad"]
    assert batch["ranks"][0].tolist() == [-3, 2.5]


def test_any_ratings_are_compared_anew_in_each_epoch(tmp_path):
    count, most = 11, 3
    path = write(tmp_path / "a.jsonl", *(rating(f"film {i}", " x", i) for i in range(count)))
    comparisons = opened(path, "ratings", completions=most, group="any")
    assert len(comparisons) == count // most
    epochs = [comparisons.batch(7, epoch * 3, 3) for epoch in range(3)]
    groupings = set()
    for batch in epochs:
        drawn = [texts(batch, row) for row in range(3)]
        assert len({text for group in drawn for text in group}) == 9
        for row, group in enumerate(drawn):
            named = [float(text.split()[1]) for text in group]
            assert (-batch["ranks"][row]).tolist() == named
        groupings.add(frozenset(frozenset(group) for group in drawn))
    assert len(groupings) == 3
    few = opened(path, "ratings", completions=20, group="any")
    assert len(few) == 1 and few.batch(0, 0, 2)["mask"].sum(-1).tolist() == [count, count]


def test_a_group_is_a_function_of_the_seed_and_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", *(ranking(number, 5) for number in range(9)))
    comparisons = opened(path, "rankings", completions=3)
    whole = comparisons.batch(3, 0, 30)
    parts = [comparisons.batch(3, first, 6) for first in range(0, 30, 6)]
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    orders = []
    for epoch in range(3):
        prompts = [texts(whole, row)[0][:6] for row in range(9 * epoch, 9 * epoch + 9)]
        assert len(set(prompts)) == 9
        orders.append(tuple(prompts))
    assert len(set(orders)) == 3
    other = comparisons.batch(4, 0, 30)
    assert not np.array_equal(whole["tokens"], other["tokens"])
    # Of a group that is too large, other completions in other epochs, each at most once.
    drawn = [frozenset(texts(whole, row)) for row in range(27)]
    assert {len(group) for group in drawn} == {3}
    assert len(set(drawn)) > 9


def test_what_is_left_out_is_counted(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        *(ranking(number) for number in range(6)),
        {**ranking(6), "ranks": [1, 1, 1]},
        {**ranking(7), "completions": [" was", " good " * T, " bad " * T]},
        {**ranking(8), "completions": [" was", " good", " bad " * T]},
        "{",
        {**ranking(9), "ranks": [1, 2]},
        {**ranking(9), "ranks": [1, 2, "3"]},
        '{"prompt": "film", "completions": [" a", " b"], "ranks": [1, NaN]}',
        {"completions": [" a", " b"], "ranks": [1, 2]},
        {"prompt": [], "completions": [" a", " b"], "ranks": [1, 2]},
    )
    comparisons = opened(path, "rankings", completions=3)
    expected = {"records": 15, "skipped": 6, "too_long": 3, "too_small": 1, "tied": 1}
    expected |= {"groups": 7, "completions": 6 * 3 + 2}
    assert {name: comparisons.facts[name] for name in expected} == expected
    batch = comparisons.batch(0, 0, 7)
    assert comparisons.facts["tokens"] == batch["lengths"][batch["mask"]].sum()
    reasons = {line["position"]: line["reason"] for line in comparisons.skipped}
    for position, reason in {
        9: "not JSON",
        10: "there are 3 completions and 2 ranks",
        11: r"ranks[2] must be a number, not str",
        12: r"ranks[1] must be finite, not nan",
        13: "prompt is missing",
        14: "prompt: messages must be a list of at least one message",
    }.items():
        assert reason in reasons[position]


def test_files_of_another_kind_and_files_of_nothing_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *(ranking(number) for number in range(3)))
    with pytest.raises(UserError, match=r"3 of 3 records are broken; .*record 1 .*chosen is miss"):
        opened(path, "pairs")
    with pytest.raises(UserError, match=r"nothing to compare .*too_long 9.*max_length"):
        opened(path, "rankings", max_length=2)
    tied = [ranking(number) | {"ranks": [1, 1, 1]} for number in range(2)]
    with pytest.raises(UserError, match=r"too_long 0, too_small 0, tied 2\): all ranks [^;]*$"):
        opened(write(tmp_path / "d.jsonl", *tied), "rankings")
    single = [rating(f"film {number}", " good", number) for number in range(2)]
    path = write(tmp_path / "e.jsonl", *single)
    with pytest.raises(
        UserError, match=r'too_small 2, tied 0\): a prompt needs .*group="any", [^;]*$'
    ):
        opened(path, "ratings")
    assert len(opened(path, "ratings", group="any")) == 1
    single = ranking(0, completions=1)
    with pytest.raises(UserError, match=r"tied 0\): a group needs two completions$"):
        opened(write(tmp_path / "f.jsonl", single), "rankings")
    with pytest.raises(UserError, match=r"data\.path .*none does not exist"):
        opened(tmp_path / "none", "pairs")
    with pytest.raises(UserError, match="has no record"):
        opened(write(tmp_path / "b.jsonl"), "pairs")
    same = {"prompt": "film", "chosen": " a", "rejected": " a"}
    with pytest.raises(UserError, match="chosen and rejected are the same"):
        opened(write(tmp_path / "c.jsonl", same), "pairs")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "data.path must name"),
        ({"completions": 1}, "data.completions must be at least 2"),
        ({"max_length": 0}, "data.max_length must be at least 1"),
        ({"group": "any"}, 'group "any" is for ratings alone'),
        ({"kind": "ratings", "extra": "b.jsonl"}, r"data.extra \(b.jsonl\) goes with data.group"),
        ({"repeat": 2}, r"data.repeat \(2\) goes with data.extra"),
        ({"kind": "ratings", "group": "any", "extra": "b", "repeat": 0}, "must be at least 1"),
    ],
)
def test_configs_that_are_refused(fields, message):
    values = {"path": "x", "kind": "pairs", "completions": 2, "max_length": T}
    with pytest.raises(UserError, match=message):
        build(values | fields, PreferenceConfig)


def test_a_folder_is_all_its_files_and_the_digest_their_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    write(one / "a.jsonl", ranking(0))
    (one / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ranking(1)).encode()))
    (one / "notes.txt").write_text("no record")
    write(two / "a.jsonl", ranking(0), ranking(1))
    whole, split = opened(two, "rankings", 3), opened(one, "rankings", 3)
    assert len(whole) == len(split) == 2
    np.testing.assert_array_equal(whole.batch(0, 0, 4)["tokens"], split.batch(0, 0, 4)["tokens"])
    digest = opened(two / "a.jsonl", "rankings", 3).digest
    assert digest == whole.digest
    other = CompletionEncoder(TOKENIZER, ENCODER.template)
    config = PreferenceConfig(str(two), "rankings", 3, T)
    assert Comparisons.open(config, other).digest != digest
    write(two / "a.jsonl", ranking(0), ranking(2))
    assert opened(two, "rankings", 3).digest != digest


def test_rated_texts_keep_their_order_and_their_raters(tmp_path):
    lines = [
        rating("film", " good", 2.5, raters=[2, 3]),
        rating("film", " good " * T, 1, raters=[1]),
        rating("film", " bad", "2", raters=[1]),
        rating("电影", " 很好", -1, raters=[-1, -1, -1], source="x"),
    ]
    rated = RatedTexts.open(write(tmp_path / "a.jsonl", *lines), ENCODER, T)
    assert (rated.prompts, rated.completions) == (["film", "电影"], [" good", " 很好"])
    assert rated.ratings.dtype == np.float64 and rated.ratings.tolist() == [2.5, -1]
    assert rated.raters == ((2, 3), (-1, -1, -1))
    assert rated.facts == {"records": 4, "skipped": 1, "too_long": 1, "texts": 2}
    assert "rating must be a number, not str" in rated.skipped[0]["reason"]
    assert rated.tokens.shape == (2, T) and rated.tokens.dtype == np.int32
    for row, length, each in zip(rated.tokens, rated.lengths, (lines[0], lines[3]), strict=True):
        whole = ENCODER.whole(each["prompt"], each["completion"])
        assert row.tolist() == whole + [0] * (T - len(whole)) and length == len(whole)
    some = [*lines, rating("film", " fair", 0)]
    assert RatedTexts.open(write(tmp_path / "b.jsonl", *some), ENCODER, T).raters is None
    with pytest.raises(UserError, match="none of its 3 texts fits into 2 tokens"):
        RatedTexts.open(tmp_path / "a.jsonl", ENCODER, 2)


def test_the_texts_of_a_ranking_are_judged_beside_one_another_alone(tmp_path):
    """Rankings and pairs are judged by as well as learnt from; a prompt's ratings where told."""
    pair = {"prompt": "film 1", "chosen": " a", "rejected": " b"}
    lines = [
        ranking(0),
        pair,
        ranking(1, completions=2),
        rating("t", " x", 1),
        rating("t", " y", 2),
    ]
    path = write(tmp_path / "a.jsonl", *lines, rating("u", " z", 3))
    rated = RatedTexts.open(path, ENCODER, T)
    said = [" was 0", " was 1", " was 2", " a", " b", " was 0", " was 1", " x", " y", " z"]
    assert rated.completions == said
    assert rated.ratings.tolist() == [0, -1, -2, 0, -1, 0, -1, 1, 2, 3]
    assert rated.groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    of_prompts = RatedTexts.open(path, ENCODER, T, "prompt")
    assert of_prompts.groups.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    # Whole groups are read where not all of them are.
    chosen = rated.spread(6)
    assert (
        chosen.tolist() == [0, 1, 2, 7, 8, 9] and rated.among(chosen).tolist() == [0] * 3 + [3] * 3
    )
    alone = [rating(f"film {number}", " good", number) for number in range(5)]
    path = write(tmp_path / "b.jsonl", *alone)
    assert RatedTexts.open(path, ENCODER, T).spread(3).tolist() == [0, 2, 4]
    assert RatedTexts.open(path, ENCODER, T).among([0, 2, 4]) is None
    with pytest.raises(UserError, match=r'no two texts to compare: .* set data\.group "any"'):
        RatedTexts.open(path, ENCODER, T, "prompt")


def test_the_digest_of_comparisons_is_that_of_other_readers_of_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", rating("film", " good", 1), rating("film", " bad", 0))
    digests = {
        opened(path, "ratings").digest,
        RatedTexts.open(path, ENCODER, T).digest,
        PromptSet.open(path, ENCODER, T).digest,
    }
    assert len(digests) == 1
