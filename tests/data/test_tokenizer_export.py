import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_examples import AWKWARD, KINDS, one_of_each_kind, same_ids, train_sentencepiece

from instar.data.gguf_tokenizer import tokenizer_from_gguf
from instar.data.tokenizer import load_tokenizer
from instar.data.tokenizer_export import save_for_transformers
from instar.data.tokenizer_formats import SentencePieceTokenizer
from instar.errors import UserError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each tokenizer, and the folder that it was exported into."""
    folder = tmp_path_factory.mktemp("exported")
    every = one_of_each_kind(tmp_path_factory.mktemp("tokenizers"))
    for kind, tokenizer in every.items():
        save_for_transformers(tokenizer, folder / kind)
    return {kind: (tokenizer, folder / kind) for kind, tokenizer in every.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_tokenizer_is_the_same(pairs, kind):
    tokenizer, folder = pairs[kind]
    exported = load_tokenizer(folder / "tokenizer.json")
    fragments = ["film", "电影", "<0x41>", "<s>", "\u2581", "12", "  ", "\n", "th", "龘"]
    character = st.characters(exclude_categories=["Cs"])

    @given(st.lists(st.one_of(st.sampled_from(fragments), character), max_size=30).map("".join))
    @example("".join(AWKWARD))
    def same(text):
        ids = tokenizer.encode(text)
        assert same_ids(kind, exported.encode(text), ids)
        assert exported.decode(ids) == text

    same()
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(exported, name) == getattr(tokenizer, name)
    assert tokenizer.special_tokens.items() <= exported.special_tokens.items()


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_what_a_sentencepiece_model_may_hold(byte_fallback, tmp_path):
    control = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    control += [(f"<0x{byte:02X}>", 6) for byte in range(256)] if byte_fallback else []
    pieces = [*control, ("<tool>", 4), *((c, 1) for c in "abc\u2581"), ("ab", 1), ("bc", 1)]
    scores = {"ab": -2.0, "bc": -1.0}
    names, types = zip(*pieces, strict=True)
    original = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(names),
            "tokenizer.ggml.token_type": list(types),
            "tokenizer.ggml.scores": [scores.get(name, -3.0) for name in names],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": False,
        }
    )
    save_for_transformers(original, tmp_path)
    exported = load_tokenizer(tmp_path / "tokenizer.json")
    # The better of two merges that overlap, a user-defined piece, unknown characters, two kinds of
    # spaces.
    for text in ("abc", "abab bc", "a<tool>bc", "axyzb x", "a \u2581 b", "<tool"):
        assert exported.encode(text) == original.encode(text)
    assert original.encode("abc") == [names.index("a"), names.index("bc")]
    assert original.encode("<tool>") == [names.index("<tool>")]
    assert exported.decode(exported.encode("a<tool>bc")) == "a<tool>bc"


def test_the_files_of_an_export(pairs, tmp_path):
    tokenizer, folder = pairs["bpe"]
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.model
    save_for_transformers(tokenizer, tmp_path, chat_template="{{ messages }}")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = {key: config[f"{key}_token"] for key in ("bos", "eos", "pad", "unk")}
    assert names == {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    assert config["chat_template"] == "{{ messages }}"
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_special_tokens_are_added_where_asked_for(pairs):
    tokenizer, folder = pairs["bpe"]
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert library.encode("film").ids == [tokenizer.bos_id, *tokenizer.encode("film")]
    assert library.encode("<|im_end|>", add_special_tokens=False).ids == [
        tokenizer.token_id("<|im_end|>")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"normalises text \(nmt_nfkc\)"),
        ({"model_type": "word"}, "type WORD has no tokenizer.json"),
    ],
)
def test_models_that_have_no_exact_counterpart(options, message, tmp_path):
    if options:
        options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = train_sentencepiece(vocab_size=40, hard_vocab_limit=False, **options)
    with pytest.raises(UserError, match=message):
        save_for_transformers(SentencePieceTokenizer(model), tmp_path)
