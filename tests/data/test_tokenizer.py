import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_examples import (
    AWKWARD,
    KINDS,
    corpus,
    one_of_each_kind,
    train_huggingface,
    train_sentencepiece,
)

from instar.config import build
from instar.data.tokenizer import (
    CHAT_TOKENS,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)
from instar.errors import UserError


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(corpus(), TokenizerConfig(vocab_size=320))


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return one_of_each_kind(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_survives(every, kind):
    tokenizer = every[kind]

    @settings(max_examples=300)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    @example("".join(AWKWARD))
    def round_trip(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)

    round_trip()
    for text in AWKWARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_encoded_as_its_texts_are(every, kind):
    texts = ["", *AWKWARD, *corpus()[:5], ""]
    batch = every[kind].encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [every[kind].encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype(np.int32)}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "huggingface"])
def test_text_cannot_pose_as_a_control_token(every, kind):
    tokenizer = every[kind]
    names = ["<|endoftext|>", "<|im_end|>"]
    if kind != "huggingface":
        names = ["<s>", "</s>", "<pad>", *CHAT_TOKENS, "<|reserved_0|>", "<|reserved_15|>"]
    control = {tokenizer.token_id(name) for name in names}
    control |= {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    for text in (*names, "".join(names), " ".join(names), "film" + "film".join(names)):
        assert not control & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The tokens themselves show nothing.
    assert tokenizer.decode([*control, *tokenizer.encode("film")]) == "film"


def test_the_layout_of_a_trained_vocabulary(bpe):
    assert bpe.vocab_size == 320
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 2)
    assert bpe.encode("\n") == [bpe.token_id("\n")]
    assert bpe.encode("film\n\nfilm").count(bpe.token_id("\n")) == 2
    with pytest.raises(UserError, match=r"no token .*nothing"):
        bpe.token_id("<|nothing|>")


def test_part_of_a_character_shows_as_a_replacement(bpe):
    assert bpe.decode(bpe.encode("\u2581")[:2]) == "\ufffd"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(kind):
    config = TokenizerConfig(kind=kind, vocab_size=310)
    once, again = (train_tokenizer(corpus(), config) for _ in range(2))
    assert once.digest == again.digest
    assert once.digest != train_tokenizer(corpus(seed=1), config).digest


def test_training_stops_reading_at_its_share_of_the_text():
    size = sum(len(text.strip().encode()) for text in corpus())
    config = TokenizerConfig(vocab_size=310, train_bytes=size)

    def endless():
        yield from corpus()
        while True:
            yield "other words altogether"

    assert train_tokenizer(endless(), config).digest == train_tokenizer(corpus(), config).digest


def test_training_takes_lines_without_end():
    texts = ["film" * 50_000, "电影很好" * 50_000]
    assert train_tokenizer(texts, TokenizerConfig(vocab_size=300)).vocab_size == 300


@pytest.mark.parametrize(
    ("texts", "config", "message"),
    [
        ([], {}, "there is no text"),
        ([""], {}, "there is no text"),
        (["a few words"], {}, r"vocab_size=4096 is too large .* at most \d+, or more text"),
        (["".join(map(chr, range(0x4E00, 0x5E00)))], {}, r"vocab_size=4096 .* at least 4\d\d\d"),
    ],
)
def test_text_that_does_not_fit_the_vocabulary(texts, config, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, TokenizerConfig(**config))


def test_reading_errors_reach_the_caller_as_they_are():
    def texts():
        yield "film"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(texts(), TokenizerConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 200}, "tokenizer.vocab_size must be at least 283"),
        ({"reserved": -1}, "tokenizer.reserved"),
        ({"train_bytes": 0}, "tokenizer.train_bytes"),
        ({"path": ""}, "tokenizer.path"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        build(values, TokenizerConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(every, kind, tmp_path):
    saved = every[kind]
    saved.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "digest"):
        assert getattr(loaded, name) == getattr(saved, name)
    text = "the film was très 很好\u2581"
    assert loaded.encode(text) == saved.encode(text)


def test_sentencepiece_made_elsewhere_gives_its_own_ids(every, tmp_path):
    tokenizer = every["llama"]
    tokenizer.save(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in ("the film", " the film", "", "\n", "电影 x", "film\nfilm"):
        assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.pad_id == tokenizer.eos_id == reference.eos_id()


def test_huggingface_special_tokens(tmp_path):
    train_huggingface().save(str(tmp_path / "tokenizer.json"))
    guessed = load_tokenizer(tmp_path)
    ends = guessed.token_id("<|endoftext|>")
    assert (guessed.bos_id, guessed.eos_id, guessed.pad_id) == (ends, ends, ends)

    names = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>", "x": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    told = load_tokenizer(tmp_path)
    assert (told.bos_id, told.eos_id) == (ends, told.token_id("<|im_end|>"))
    told.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eos_id == told.eos_id

    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    with pytest.raises(UserError, match=r"no token .*nowhere"):
        load_tokenizer(tmp_path)


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(UserError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "no_eos.model").write_bytes(
        train_sentencepiece(vocab_size=40, eos_id=-1, hard_vocab_limit=False)
    )
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(tmp_path / "no_eos.model")
