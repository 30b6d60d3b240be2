import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_examples import AWKWARD, KINDS, one_of_each_kind, train_huggingface

from instar.data.stream_decoder import StreamDecoder
from instar.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return one_of_each_kind(tmp_path_factory.mktemp("tokenizers"))


def chunks(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunks_of_any_ids_are_the_text(every, kind):
    tokenizer = every[kind]

    # A few beyond the vocabulary too, as a model with a padded one can draw.
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    @example(list(range(tokenizer.vocab_size)))
    def joined(ids):
        assert "".join(chunks(tokenizer, ids)) == tokenizer.decode(ids)

    joined()
    for text in AWKWARD:
        assert "".join(chunks(tokenizer, tokenizer.encode(text))) == text


@pytest.mark.parametrize("kind", KINDS)
def test_characters_come_out_whole_and_with_their_last_token(every, kind):
    text = "龘🙂 龘"  # in no vocabulary, so three or four tokens each
    ids = every[kind].encode(text)
    came = chunks(every[kind], ids)
    assert [chunk for chunk in came if chunk.strip()] == ["龘", "🙂", "龘"]
    assert came[-2:] == ["龘", ""]
    # What is cut off in a character shows that something was there.
    assert "".join(chunks(every[kind], ids[:-1])) == "龘🙂 \ufffd"


def test_byte_level_text_is_what_the_library_decodes(every):
    library = train_huggingface()

    @given(st.lists(st.integers(0, library.get_vocab_size() - 1), max_size=12))
    def same(ids):
        assert every["huggingface"].decode(ids) == library.decode(ids)

    same()


def test_a_decoder_that_looks_at_neighbours_is_read_at_the_end(tmp_path):
    vocab = {"[PAD]": 0, "[SEP]": 1, "[UNK]": 2, "play": 3, "##ing": 4, "film": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.decoder = tokenizers.decoders.WordPiece()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert chunks(tokenizer, [3, 4, 5, 1]) == ["", "", "", "", "playing film"]


def test_byte_tokens_of_a_tokenizer_json_are_decoded_as_utf_8(tmp_path):
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"</s>": 256, "\u2581": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = [257, 257, *"很好".encode(), 0xE7, 0x41, 256]
    # The stray 0xE7 spoils itself alone, and one of the two spaces is the prefix.
    assert tokenizer.decode(ids) == " 很好\ufffdA"
    assert "".join(chunks(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_plain_token_named_as_eos_becomes_special(tmp_path):
    made = train_huggingface()
    made.add_tokens([tokenizers.AddedToken("<|end|>", special=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id not in tokenizer.encode("film<|end|>")
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.special_tokens["<|end|>"] == tokenizer.eos_id
