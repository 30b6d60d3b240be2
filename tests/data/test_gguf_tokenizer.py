import json

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizer_examples import AWKWARD, train_huggingface, train_sentencepiece

from instar.data.gguf_tokenizer import tokenizer_from_gguf
from instar.errors import UserError


def byte_level(**changed) -> dict:
    """The metadata of a GPT-2-like vocabulary; its last token is `<|im_end|>`."""
    model = json.loads(train_huggingface().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": tokens.index("<|endoftext|>"),
        "eos_token_id": tokens.index("<|im_end|>"),
    } | changed
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def sentencepiece_metadata(model: bytes) -> dict:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_byte_level_bpe_gives_the_ids_of_the_tokenizer_it_came_from():
    tokenizer, original = tokenizer_from_gguf(byte_level()), train_huggingface()
    for text in AWKWARD[:-2]:  # those that spell no special token
        assert tokenizer.encode(text) == original.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_file_says_which_tokens_are_special():
    tokenizer = tokenizer_from_gguf(byte_level())
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_end|>": 1}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert not {0, 1} & set(tokenizer.encode("<|im_end|><|endoftext|>"))


def test_user_defined_tokens_are_found_in_text_and_are_text():
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"].append("<思考 on>")  # spelled as it is, not by bytes
    metadata["tokenizer.ggml.token_type"].append(4)
    tokenizer = tokenizer_from_gguf(metadata)
    ids = tokenizer.encode("film<思考 on>")
    assert ids[-1] == tokenizer.vocab_size - 1
    assert tokenizer.decode(ids) == "film<思考 on>"
    assert "<思考 on>" not in tokenizer.special_tokens


def test_llama_3_has_words_that_no_merges_lead_to():
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        metadata = byte_level(pre=pre)
        metadata["tokenizer.ggml.tokens"].append("xyzzy")
        metadata["tokenizer.ggml.token_type"].append(1)
        assert (len(tokenizer_from_gguf(metadata).encode("xyzzy")) == 1) == whole


def test_whether_texts_begin_with_bos_is_kept_for_other_programs():
    for values, begin in (
        ({"add_bos_token": True}, [0]),
        ({"add_bos_token": False, "pre": "llama-bpe"}, []),
        ({}, []),
        ({"pre": "llama-bpe"}, [0]),
    ):
        tokenizer = tokenizer_from_gguf(byte_level(**values))
        library = tokenizers.Tokenizer.from_str(tokenizer.model.decode())
        assert library.encode("film").ids == [*begin, *tokenizer.encode("film")]


def eager(pre: str, text: str) -> dict:
    """The metadata of a vocabulary whose merges join all of `text`, as far as they are let."""
    spelled = text.replace(" ", "Ġ").replace("\n", "Ċ")
    tokens, merges = sorted(set(spelled)), []
    for length in range(2, len(spelled) + 1):
        parts = {spelled[at : at + length] for at in range(len(spelled) - length + 1)}
        cuts = range(1, length)
        merges += [f"{part[:cut]} {part[cut:]}" for part in sorted(parts) for cut in cuts]
        tokens += sorted(parts)
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "</s>"],
        "token_type": [1] * len(tokens) + [3],
        "merges": merges,
        "eos_token_id": len(tokens),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", [" ", " 111", "aa", "\n\n", " 11", "'", "S", "+", "b"]),
        ("smollm", ["  ", "1", "1", "1", "aa", "\n\n ", "1", "1", "'", "S", "+", "b"]),
        ("default", [" ", " ", "111", "aa", "\n\n", " ", "11", "'", "S", "+", "b"]),
        ("llama-bpe", [" ", " ", "111", "aa", "\n\n", " ", "11", "'S", "+b"]),
        ("qwen2", [" ", " ", "1", "1", "1", "aa", "\n\n", " ", "1", "1", "'S", "+b"]),
    ],
)
def test_pieces_stay_within_what_the_pre_tokenizer_cuts(pre, pieces):
    text = "  111aa\n\n 11'S+b"
    tokenizer = tokenizer_from_gguf(eager(pre, text))
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == pieces


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_gives_the_ids_of_the_model_it_came_from(dummy_prefix):
    model = train_sentencepiece(
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
    )
    metadata = sentencepiece_metadata(model)
    if not dummy_prefix:  # the default is to have one
        metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = tokenizer_from_gguf(metadata)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in AWKWARD[3:]:  # those without U+2581
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model='bert' is not supported; .* gpt2, llama"),
        ({"model": 3}, r"tokenizer\.ggml\.model must be a str, not a int"),
        ({"pre": "novel"}, r"tokenizer\.ggml\.pre='novel' is not a known pre-tokenizer"),
        ({"tokens": ["a", 1]}, r"tokenizer\.ggml\.tokens\[1\] must be a str, not a int"),
        ({"tokens": "a b"}, r"tokenizer\.ggml\.tokens must be a list, not a str"),
        ({"tokens": ["a", "a"]}, "names a token twice"),
        ({"token_type": [1]}, "token_type has 1 values for 300 tokens"),
        ({"eos_token_id": 300}, "eos_token_id=300 is not among the 300 tokens"),
        ({"merges": ["a"]}, r"tokenizer\.ggml\.merges\[0\]='a'"),
        ({"merges": ["f i", "nothing such"]}, r"tokenizer\.ggml\.merges\[1\]='nothing such'"),
    ],
)
def test_metadata_that_makes_no_tokenizer(changed, message):
    with pytest.raises(UserError, match=message):
        tokenizer_from_gguf(byte_level(**changed))


@pytest.mark.parametrize("name", ["model", "tokens", "token_type", "merges", "eos_token_id"])
def test_metadata_that_is_missing(name):
    metadata = byte_level()
    del metadata[f"tokenizer.ggml.{name}"]
    with pytest.raises(UserError, match=f"has no tokenizer.ggml.{name}"):
        tokenizer_from_gguf(metadata)


def test_a_vocabulary_that_is_no_sentencepiece_model():
    metadata = sentencepiece_metadata(train_sentencepiece(model_type="bpe", vocab_size=60))
    metadata["tokenizer.ggml.token_type"][0] = 1
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.\* cannot be used"):
        tokenizer_from_gguf(metadata)
