"""Small tokenizers of every kind, and text that has broken tokenizers before."""

import io
import pathlib
import random
import tempfile

import sentencepiece
import tokenizers

from instar.data.chat import NAMES, ChatTemplate
from instar.data.tokenizer import (
    CHAT_TOKENS,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)

WORDS = ["the", "film", "was", "good", "bad", "très", "电影", "很好", "def", "return", "x12", "🙂"]

# What has broken tokenizers before: SentencePiece's own space and unknown characters, NUL, line
# ends, runs of spaces, a byte-order mark, characters of many code points, text that looks special.
AWKWARD = (
    "\u2581",
    " \u2581 a\u2581\u2581b \u2581",
    "\u2585 \u2047 \ufffd",
    "\0a\0",
    "a\r\nb\rc\n\n",
    "  two  spaces\tand\ttabs  ",
    "\ufeff\u00a0\u3000\u200b",
    "👩‍👩‍👧‍👦 e\u0301 é ﬁ ①",
    "def f(x):\n    return x**2  # 平方\n",
    "<s></s><unk><pad><0x0A>",
    "".join(CHAT_TOKENS) + "<|reserved_0|>",
)


def corpus(seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=30)) + ".\n" for _ in range(300)]


def train_sentencepiece(**options) -> bytes:
    """A SentencePiece model as other projects make them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


def train_huggingface() -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def train_chat_huggingface() -> tokenizers.Tokenizer:
    """A byte-level BPE with the special tokens of every named template."""
    tokenizer = train_huggingface()
    named = map(ChatTemplate.named, NAMES)
    needed = {name for each in named for name in each.required + each.stop_tokens}
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", *sorted(needed)])
    return tokenizer


def chat_tokenizer() -> Tokenizer:
    """What `train_chat_huggingface` trains, loaded."""
    with tempfile.TemporaryDirectory() as folder:
        train_chat_huggingface().save(f"{folder}/tokenizer.json")
        return load_tokenizer(folder)


def same_ids(kind: str, ids: list[int], others: list[int]) -> bool:
    """Whether two programs encode alike; a unigram model's may order equal pieces differently."""
    return sorted(ids) == sorted(others) if "unigram" in kind else ids == others


KINDS = ("bpe", "unigram", "huggingface", "llama")


def one_of_each_kind(folder: pathlib.Path) -> dict[str, Tokenizer]:
    """Tokenizers of our own training, and two such as others make."""
    train_huggingface().save(str(folder / "tokenizer.json"))
    (folder / "llama.model").write_bytes(
        # As LLaMA's: a space before the text, and no token for padding.
        train_sentencepiece(
            model_type="bpe",
            vocab_size=310,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    )
    return {
        "bpe": train_tokenizer(corpus(), TokenizerConfig(vocab_size=320)),
        "unigram": train_tokenizer(corpus(), TokenizerConfig(kind="unigram", vocab_size=310)),
        "huggingface": load_tokenizer(folder / "tokenizer.json"),
        "llama": load_tokenizer(folder / "llama.model"),
    }
