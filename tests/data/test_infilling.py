"""Texts as blanks to fill in: what a text becomes, and what the data set says of it."""

import json
import math
import pathlib
import random

import numpy as np
import pytest
from tokenizer_examples import (
    WORDS,
    corpus,
    train_chat_huggingface,
    train_huggingface,
    train_sentencepiece,
)

from instar.config import build
from instar.data.dataset import TokenDataset
from instar.data.encoders import Document
from instar.data.formats import Broken
from instar.data.infilling import BlankTokens, InfillingEncoder
from instar.data.prepare import PrepareConfig, prepare
from instar.data.prepare_config import InfillingConfig
from instar.data.rows import HeldOutRows, TrainingRows
from instar.data.sources import Record
from instar.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from instar.errors import UserError

NAMES = list(InfillingConfig().tokens.values())
# What a text adds to its tokens, and how long a piece of one may be.
LIMIT = 24
ROOM = LIMIT - 3


def byte_level(folder: pathlib.Path) -> Tokenizer:
    made = train_chat_huggingface()
    made.add_special_tokens(["[MASK]"])
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def with_dummy_prefix(folder: pathlib.Path) -> Tokenizer:
    model = train_sentencepiece(
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=NAMES,
    )
    (folder / "llama.model").write_bytes(model)
    return load_tokenizer(folder / "llama.model")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    trained = train_tokenizer(corpus(), TokenizerConfig(vocab_size=330), NAMES)
    return {
        "trained": trained,
        "byte level": byte_level(folder),
        "dummy prefix": with_dummy_prefix(folder),
    }


KINDS = pytest.mark.parametrize("kind", ["trained", "byte level", "dummy prefix"])


def some_texts(count: int, seed: int = 0, most: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [f"{n} " + " ".join(rng.choices(WORDS, k=rng.randint(1, most))) for n in range(count)]


def encoded(
    tokenizer: Tokenizer, texts: list[str], seed: int = 0, limit: int = LIMIT, **fields
) -> list[list[Document]]:
    encode = InfillingEncoder(tokenizer, InfillingConfig(**fields), limit, seed)
    return encode([Record("a", n, text, None) for n, text in enumerate(texts)])


def parts_of(document: Document, tokens: BlankTokens) -> tuple[str, list, list, list, bool]:
    """(kind, before, blank, after, whether it ends with the end token)."""
    ids = document.ids.tolist()
    (start,) = [place for place, token in enumerate(ids) if token == tokens.start]
    masks = {tokens.long_mask: "long", tokens.short_mask: "short"}
    ((place, kind),) = [(n, masks[token]) for n, token in enumerate(ids) if token in masks]
    ended = ids[-1] == tokens.end
    blank = ids[start + 1 : -1] if ended else ids[start + 1 :]
    assert place < start and tokens.end not in ids[:-1]
    assert document.targets.tolist() == [n >= start for n in range(len(ids))]
    return kind, ids[:place], blank, ids[place + 1 : start], ended


# --- A text -------------------------------------------------------------------------------------


@KINDS
def test_the_blanks_put_back_give_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = BlankTokens.of(InfillingConfig(), tokenizer)
    texts = [*some_texts(150), "a", "[MASK] and <sop>, spelled <eop>"]
    ids_of = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    seen = set()
    for expected, documents in zip(ids_of, encoded(tokenizer, texts, short_share=0.5), strict=True):
        joined = []
        for number, document in enumerate(documents):
            assert len(document.ids) <= LIMIT
            name, before, blank, after, ended = parts_of(document, tokens)
            piece, begins, ends = [*before, *blank, *after], number == 0, document is documents[-1]
            assert blank and len(piece) <= ROOM and (ends or len(piece) == ROOM)
            # Where the text goes on beyond the piece, there is something beside the blank.
            assert before or begins
            if name == "short":
                assert ended and (after or ends)
            else:
                assert not after and ended == ends
            # Each further piece goes on with the last token of the one before.
            assert begins or piece[0] == joined[-1]
            joined += piece if begins else piece[1:]
            seen.add((name, begins, ends))
        assert joined == expected
    assert len(seen) == 8  # both kinds, in pieces of every sort


@KINDS
def test_the_bytes_are_those_of_what_the_blank_hides(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = BlankTokens.of(InfillingConfig(), tokenizer)
    texts, whole, compared = some_texts(300, most=6), 0, 0
    for text, documents in zip(texts, encoded(tokenizer, texts, limit=400), strict=True):
        (document,) = documents
        _, before, _, after, _ = parts_of(document, tokens)
        # The text's length without what stands beside the blank: where no character is broken, and
        # what is behind has not lost a space to the decoder.
        around = tokenizer.decode([*before, *after])
        if "\ufffd" not in around and (before or not after):
            assert document.bytes == len(text.encode()) - len(around.encode())
            compared += 1
        whole += not before and not after
    assert compared > 200 and whole > 5


def test_short_blanks_are_as_many_and_as_long_as_asked_for(tokenizers):
    """Within four standard errors: of a binomial, and of a Poisson variable that is not 0."""
    tokenizer = tokenizers["trained"]
    tokens, texts = BlankTokens.of(InfillingConfig(), tokenizer), some_texts(3000, most=12)
    documents = [document for each in encoded(tokenizer, texts, limit=200) for document in each]
    assert len(documents) == 3000
    found = [parts_of(document, tokens) for document in documents]
    lengths = [len(blank) for kind, _, blank, _, _ in found if kind == "short"]
    assert abs(len(lengths) - 0.3 * 3000) < 4 * math.sqrt(3000 * 0.3 * 0.7)
    longer = [
        len(blank)
        for kind, before, blank, after, _ in found
        if kind == "short" and len(before) + len(blank) + len(after) > 20
    ]
    mean, square = 3 / (1 - math.exp(-3)), 12 / (1 - math.exp(-3))
    assert len(longer) > 300 and min(longer) == 1 and max(longer) > 6
    error = math.sqrt((square - mean**2) / len(longer))
    assert abs(np.mean(longer) - mean) < 4 * error
    # A blank lies anywhere: the share of the text before it is uniform, in long and in short ones.
    for wanted in ("long", "short"):
        shares = [
            (len(before) + 0.5) / (len(before) + (len(blank) if kind == "long" else 1) + len(after))
            for kind, before, blank, after, _ in found
            if kind == wanted
        ]
        quarters = np.histogram(shares, bins=4, range=(0, 1))[0]
        sigma = math.sqrt(len(shares) * 0.25 * 0.75)
        assert np.abs(quarters - len(shares) / 4).max() < 4 * sigma + 0.05 * len(shares)


def test_all_blanks_may_be_of_one_kind(tokenizers):
    tokens = BlankTokens.of(InfillingConfig(), tokenizers["trained"])
    for share, kind in ((0.0, "long"), (1.0, "short")):
        made = encoded(tokenizers["trained"], some_texts(40), short_share=share)
        assert {parts_of(each, tokens)[0] for document in made for each in document} == {kind}


def test_a_blank_depends_on_its_text_and_the_seed_alone(tokenizers):
    def ids(texts: list[str], seed: int) -> list[list[list[int]]]:
        made = encoded(tokenizers["trained"], texts, seed)
        return [[document.ids.tolist() for document in each] for each in made]

    texts = some_texts(60)
    first = ids(texts, 0)
    assert ids(texts[::-1], 0) == first[::-1] and ids(texts[7:9], 0) == first[7:9]
    same = sum(a == b for a, b in zip(first, ids(texts, 1), strict=True))
    assert same < 10


def test_a_text_of_no_token_is_broken(tokenizers, tmp_path):
    made = train_huggingface()
    made.add_special_tokens([*NAMES, "</s>"])
    model = json.loads(made.to_str())
    model["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    blank, good = encoded(load_tokenizer(tmp_path / "tokenizer.json"), ["  ", "a b"])
    assert isinstance(blank, Broken) and len(good) == 1


# --- A data set ---------------------------------------------------------------------------------

S = 32
TEXTS = {"name": "texts", "kind": "jsonl"}


def write_lines(path: pathlib.Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(folder: pathlib.Path, **fields) -> PrepareConfig:
    texts = write_lines(folder / "texts.jsonl", [{"text": text} for text in some_texts(200)])
    values = {
        "sources": [TEXTS | {"path": texts}],
        "tokenizer": {"vocab_size": 340},
        "sequence_lengths": [S],
        "held_out": 0.1,
        "infilling": {},
        "shard_tokens": 900,
    }
    return build(values | fields, PrepareConfig)


def test_rows_hold_whole_texts_and_learn_what_stands_behind_their_starts(tmp_path):
    prepare(config_of(tmp_path, record_tokens=9), tmp_path / "data")
    dataset = TokenDataset.open(tmp_path / "data")
    source, blanks = dataset.sources["texts"], dataset.blanks
    special = dataset.tokenizer.special_tokens
    assert blanks == BlankTokens(*(special[name] for name in NAMES))
    assert not dataset.dialogues and dataset.chat_template is None
    assert len(source.facts["shards"]) > 3 and "cut" not in source.facts
    index = source.pack_index("train", S)
    assert (index.start == 0).all() and index.rows < len(index.document)
    rows = TrainingRows(dataset, sequence_length=S, weights={}, seed=0).rows(np.arange(40))
    for row in range(40):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            places = np.flatnonzero(rows["segment_ids"][row] == segment)
            ids = rows["tokens"][row, places].tolist()
            assert ids.count(blanks.start) == 1
            start, weights = ids.index(blanks.start), rows["weights"][row, places]
            # The last of a text is a target alone, where the row does not end with it.
            assert not weights[: start - 1].any() and weights[start - 1 : -1].all()
    held_out = HeldOutRows(dataset, sequence_length=S, weights={}, batch=4)
    learnt = sum(batch["weights"].sum() for batch in held_out)
    assert held_out.tokens_per_byte == pytest.approx(
        learnt / source.documents.bytes[source.documents.held_out].sum()
    )


def test_all_pieces_of_a_text_fall_on_one_side(tmp_path):
    config = config_of(tmp_path, held_out=0.5)
    prepare(config, tmp_path / "data")
    dataset = TokenDataset.open(tmp_path / "data")
    source = dataset.sources["texts"]
    made = encoded(dataset.tokenizer, some_texts(200), limit=S + 1)
    texts = np.repeat(np.arange(200), [len(each) for each in made])
    stored = source.document_tokens(np.arange(len(texts)))
    for document, ids in zip((d for each in made for d in each), stored, strict=True):
        assert document.ids.tolist() == ids.tolist()
    sides = [set(source.documents.held_out[texts == n].tolist()) for n in range(200)]
    assert all(len(side) == 1 for side in sides) and {True} in sides and {False} in sides


def test_epochs_are_those_of_the_dialogues_beside_them(tmp_path):
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}]
    chats = {"name": "chats", "kind": "jsonl", "dialogue": "messages"}
    chats["path"] = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 40)
    texts = TEXTS | {"path": str(tmp_path / "texts.jsonl")}
    config = config_of(tmp_path, sources=[texts, chats], chat_template="chatglm", held_out=0.0)
    prepare(config, tmp_path / "data")
    dataset = TokenDataset.open(tmp_path / "data")
    assert dataset.dialogues == {"chats"}
    weights = {"texts": 0.5, "chats": 0.5}
    rows = TrainingRows(dataset, sequence_length=S, weights=weights, seed=0)
    read = rows.epochs(rows.rows_of_epochs(300.0))
    assert read["chats"] == pytest.approx(300, rel=0.02) and read["texts"] < 250


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"infilling": {"short_share": 1.5}}, r"infilling\.short_share must be in \[0, 1\]"),
        ({"infilling": {"short_mask": "[gMASK]"}}, "four different tokens"),
        ({"sequence_lengths": [4]}, "sequence_lengths must have one of at least 5"),
        (
            {"sources": [TEXTS | {"path": "x", "dialogue": "messages"}], "chat_template": "plain"},
            "infilling is for plain texts, and all sources have dialogues",
        ),
    ],
)
def test_configs_that_make_no_sense(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, **fields)


def test_the_shortest_rows_that_a_config_may_have(tmp_path, tokenizers):
    """Every piece has a place for its blank."""
    tokens = BlankTokens.of(InfillingConfig(), tokenizers["trained"])
    config = config_of(tmp_path, sequence_lengths=[5])
    for share in (0.0, 1.0):
        made = encoded(tokenizers["trained"], some_texts(30), limit=6, short_share=share)
        assert all(parts_of(each, tokens)[2] for documents in made for each in documents)
    assert max(len(each.ids) for documents in made for each in documents) == 6
    assert config.sequence_lengths == (5,)


def test_a_token_that_the_tokenizer_lacks_is_named_and_leaves_nothing_behind(tmp_path):
    train_chat_huggingface().save(str(tmp_path / "tokenizer.json"))
    config = config_of(tmp_path, tokenizer={"path": str(tmp_path / "tokenizer.json")})
    message = r"infilling\.short_mask: the tokenizer has no special token '\[MASK\]'"
    with pytest.raises(UserError, match=message):
        prepare(config, tmp_path / "data")
    assert not (tmp_path / "data").exists()
