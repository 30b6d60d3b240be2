"""Dialogues to learn from: formats, the loss mask turn by turn, and what is refused."""

import numpy as np
import pytest

from instar.data.chat import NAMES, ChatTemplate, encode_chat, stop_ids
from instar.data.dialogues import ALPACA_WITH_INPUT, encode_dialogue, read_dialogue
from instar.data.tokenizer import TokenizerConfig, train_tokenizer
from instar.errors import UserError

TEXTS = ["What is the sea? It is wide, said the fisherman, and it is deep; nobody knows.\n"] * 30
TOKENIZER = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=330, reserved=2))

TWO_TURNS = [
    {"role": "user", "content": "What is the sea?"},
    {"role": "assistant", "content": "It is wide."},
    {"role": "user", "content": "And deep? 你好"},
    {"role": "assistant", "content": "Nobody knows."},
]


def decoded(dialogue, chosen: np.ndarray) -> list[str]:
    """The runs of tokens where `chosen` holds, with special tokens by name."""
    places = np.flatnonzero(chosen)
    runs = np.split(dialogue.ids[places], np.flatnonzero(np.diff(places) > 1) + 1)
    names = {token: name for name, token in TOKENIZER.special_tokens.items()}
    return [text_of(run.tolist(), names) for run in runs]


def text_of(ids: list[int], names: dict[int, str]) -> str:
    text, plain = "", []
    for token in [*ids, None]:
        if token is None or token in names:
            text, plain = text + TOKENIZER.decode(plain), []
            text += names.get(token, "")
        else:
            plain.append(token)
    return text


# What a model learns to say in each turn: with the end token, and with the spaces before it.
SAID = {
    "chatml": ["It is wide.<|im_end|>", "Nobody knows.<|im_end|>"],
    "vicuna": [" It is wide.</s>", " Nobody knows.</s>"],
    "alpaca": ["It is wide.</s>", "Nobody knows.</s>"],
    "llama2": [" It is wide. </s>", " Nobody knows. </s>"],
    "plain": ["It is wide.</s>", "Nobody knows.</s>"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_assistants_words_and_end_tokens_are_the_targets(name):
    template = ChatTemplate.named(name)
    dialogue = encode_dialogue(TOKENIZER, template, TWO_TURNS, begin=[TOKENIZER.bos_id])
    assert decoded(dialogue, dialogue.targets) == SAID[name]
    assert [int(dialogue.ids[end - 1]) in stop_ids(TOKENIZER, template) for end in dialogue.ends]
    assert dialogue.ids[0] == TOKENIZER.bos_id and not dialogue.targets[0]
    # All that a model is to say comes after exactly what it is given when it answers.
    for turn, end in enumerate(dialogue.ends):
        asked = TWO_TURNS[: 2 * turn + 1]
        prompt = encode_chat(TOKENIZER, template, asked, add_generation_prompt=True)
        first = np.flatnonzero(dialogue.targets[:end])
        begin = first[np.flatnonzero(np.diff(first, prepend=-9) > 1)[-1]]
        assert TOKENIZER.decode(dialogue.ids[:begin]) == TOKENIZER.decode(prompt)
        if turn == 0:
            assert dialogue.ids[1:begin].tolist() == prompt


def test_a_last_word_of_the_user_is_left_out():
    template = ChatTemplate.named("chatml")
    longer = [*TWO_TURNS, {"role": "user", "content": "Thanks"}]
    whole = encode_dialogue(TOKENIZER, template, TWO_TURNS)
    np.testing.assert_array_equal(encode_dialogue(TOKENIZER, template, longer).ids, whole.ids)


def test_words_that_spell_an_end_token_are_words():
    template = ChatTemplate.named("chatml")
    said = "It ends with <|im_end|> they say."
    messages = [TWO_TURNS[0], {"role": "assistant", "content": said}]
    dialogue = encode_dialogue(TOKENIZER, template, messages)
    end = TOKENIZER.token_id("<|im_end|>")
    assert (dialogue.ids[dialogue.targets] == end).sum() == 1
    assert TOKENIZER.decode(dialogue.ids[dialogue.targets]) == said


def test_a_long_dialogue_is_cut_at_a_turn():
    dialogue = encode_dialogue(TOKENIZER, ChatTemplate.named("chatml"), TWO_TURNS)
    first, last = dialogue.ends
    assert last == len(dialogue.ids)
    for limit in (first, first + 1, last - 1):
        cut = dialogue.cut(limit)
        assert (len(cut.ids), cut.ends) == (first, (first,))
        np.testing.assert_array_equal(cut.targets, dialogue.targets[:first])
    assert dialogue.cut(last).ends == dialogue.ends
    assert dialogue.cut(first - 1) is None


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """Some leave out what the assistant thought in all turns but the last."""
    source = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{{ m['content'] if loop.last else m['content'][:3] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(
        UserError, match=r"template forgetful writes messages\[1\] into what stands"
    ):
        encode_dialogue(TOKENIZER, ChatTemplate("forgetful", source), TWO_TURNS)


def test_a_template_without_an_end_token_is_refused():
    source = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="endless writes no special token"):
        encode_dialogue(TOKENIZER, ChatTemplate("endless", source), TWO_TURNS)


def test_the_formats_of_files():
    assert read_dialogue({"messages": TWO_TURNS, "id": 3}, "messages", "x") == TWO_TURNS
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert read_dialogue({"conversations": turns}, "sharegpt", "x") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    plain = read_dialogue({"instruction": "Add.", "input": "", "output": "5"}, "alpaca", "x")
    assert [message["role"] for message in plain] == ["user", "assistant"]


ALPACA_PROMPT = (
    f"{ALPACA_WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:"
)


def test_alpaca_with_an_input_is_stanfords_other_prompt():
    record = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    messages = read_dialogue(record, "alpaca", "x")
    dialogue = encode_dialogue(TOKENIZER, ChatTemplate.named("alpaca"), messages)
    assert decoded(dialogue, ~dialogue.targets) == [ALPACA_PROMPT]
    assert decoded(dialogue, dialogue.targets) == ["5</s>"]


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        ([], "messages", "must be a JSON object, not list"),
        ({}, "messages", "messages must be a list, not NoneType"),
        ({"messages": []}, "messages", "at least one message"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages",
            r"messages\[0\]\.role must be",
        ),
        ({"messages": TWO_TURNS[:1]}, "messages", "the assistant says nothing"),
        (
            {"messages": [TWO_TURNS[0], {"role": "assistant", "content": " \n"}]},
            "messages",
            r"messages\[1\] \(assistant\) is empty",
        ),
        ({"instruction": "x"}, "alpaca", "output must be a text, not NoneType"),
        (
            {"instruction": "x", "input": 3, "output": "y"},
            "alpaca",
            "input must be a text, not int",
        ),
        (
            {"conversations": [{"from": "cat", "value": "x"}]},
            "sharegpt",
            r"conversations\[0\] must",
        ),
        (
            {"conversations": [{"from": "gpt"}]},
            "sharegpt",
            r"messages\[0\]\.content must be a text",
        ),
    ],
)
def test_a_record_that_is_wrong_is_named(record, form, message):
    with pytest.raises(UserError, match=rf"a\.jsonl, line 7: .*{message}"):
        read_dialogue(record, form, "a.jsonl, line 7")
