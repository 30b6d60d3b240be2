"""Dialogues to learn from: formats, the loss mask turn by turn, and what is refused."""

import numpy as np
import pytest
from tokenizer_examples import chat_tokenizer

from instar.data.chat import NAMES, ChatTemplate, encode_chat, stop_ids
from instar.data.dialogues import ALPACA_WITH_INPUT, encode_dialogue, read_dialogue
from instar.errors import UserError

TOKENIZER = chat_tokenizer()

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
    return [text_of(run.tolist()) for run in runs]


def text_of(ids: list[int]) -> str:
    names = {token: name for name, token in TOKENIZER.special_tokens.items()}
    text, plain = "", []
    for token in [*ids, None]:
        if token is None or token in names:
            text, plain = text + TOKENIZER.decode(plain), []
            text += names.get(token, "")
        else:
            plain.append(token)
    return text


# What a model learns to say in each turn: with the end token, and with the spaces before it. In a
# list of its own is what it learns from a text of its own, whose prompt holds the turns before.
SAID = {
    "chatml": [["It is wide.<|im_end|>", "Nobody knows.<|im_end|>"]],
    "vicuna": [[" It is wide.</s>", " Nobody knows.</s>"]],
    "alpaca": [["It is wide.</s>", "Nobody knows.</s>"]],
    "llama2": [[" It is wide. </s>", " Nobody knows. </s>"]],
    "plain": [["It is wide.</s>", "Nobody knows.</s>"]],
    "baichuan": [["It is wide.</s>"], ["Nobody knows.</s>"]],
    "baichuan2": [["It is wide.</s>"], ["Nobody knows.</s>"]],
    "chatglm": [["<sop>It is wide.<eop>"], ["<sop>Nobody knows.<eop>"]],
    "chatglm2": [["It is wide.</s>"], ["Nobody knows.</s>"]],
    "chatglm3": [["\nIt is wide.<|user|>", "\nNobody knows.<|user|>"]],
    # All but the meta instruction, of which there is none here.
    "moss": [
        [
            "<|Human|>: What is the sea?<eoh>\n<|MOSS|>: It is wide.<eom>\n"
            "<|Human|>: And deep? 你好<eoh>\n<|MOSS|>: Nobody knows.<eom>"
        ]
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_assistants_words_and_end_tokens_are_the_targets(name):
    template = ChatTemplate.named(name)
    texts = encode_dialogue(TOKENIZER, template, TWO_TURNS, begin=[TOKENIZER.bos_id])
    assert [decoded(text, text.targets) for text in texts] == SAID[name]
    turn = 0
    for text in texts:
        assert text.ids[0] == TOKENIZER.bos_id and not text.targets[0]
        for begin, end in zip(text.begins, text.ends, strict=True):
            assert text.ids[end - 1] in stop_ids(TOKENIZER, template) and text.targets[end - 1]
            # All that a model is to say comes after exactly what it is given when it answers.
            assert text.targets[begin:end].all()
            asked = TWO_TURNS[: 2 * turn + 1]
            prompt = encode_chat(TOKENIZER, template, asked, add_generation_prompt=True)
            assert TOKENIZER.decode(text.ids[:begin]) == TOKENIZER.decode(prompt)
            if begin == text.begins[0]:
                assert text.ids[1:begin].tolist() == prompt
            turn += 1
    assert turn == 2


MOSS_TURN = {
    "role": "assistant",
    "content": "It is wide.",
    "inner_thoughts": "Look it up",
    "commands": 'Search("sea<eoc>")',
    "results": "wide<eor>",
}


def test_moss_learns_all_but_its_instruction_and_what_tools_give():
    instruction = {"role": "system", "content": "You are MOSS.\n"}
    messages = [instruction, TWO_TURNS[0], MOSS_TURN, *TWO_TURNS[2:]]
    (text,) = encode_dialogue(TOKENIZER, ChatTemplate.named("moss"), messages)
    assert decoded(text, ~text.targets) == ["You are MOSS.\n", " wide<eor>"]
    assert decoded(text, text.targets) == [
        "<|Human|>: What is the sea?<eoh>\n<|Inner Thoughts|>: Look it up<eot>\n"
        '<|Commands|>: Search("sea<eoc>")<eoc>\n<|Results|>:',
        "<eor>\n<|MOSS|>: It is wide.<eom>\n<|Human|>: And deep? 你好<eoh>\n"
        "<|MOSS|>: Nobody knows.<eom>",
    ]
    first, second = text.begins
    assert text_of(text.ids[:first].tolist()) == "You are MOSS.\n<|Human|>: What is the sea?<eoh>\n"
    assert text_of(text.ids[:second].tolist()).endswith("And deep? 你好<eoh>\n<|MOSS|>:")
    # A tool's words end nothing, and what was learnt is counted without the tokens that end it.
    assert [(text.ids == TOKENIZER.token_id(name)).sum() for name in ("<eoc>", "<eor>")] == [1, 1]
    names = TOKENIZER.special_tokens.values()
    learnt = [token for token in text.ids[text.targets] if token not in names]
    assert sum(text.sizes) == len(TOKENIZER.decode(learnt).encode())


def test_generation_blocks_say_what_is_learnt():
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}<|im_start|>{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    (text,) = encode_dialogue(TOKENIZER, ChatTemplate("marked", source), TWO_TURNS)
    assert decoded(text, text.targets) == [
        "<|im_start|>It is wide.<|im_end|>",
        "<|im_start|>Nobody knows.<|im_end|>",
    ]
    ends = "<|im_end|>{% endgeneration %}"
    without = source.replace(ends, "{% endgeneration %}<|im_end|>")
    with pytest.raises(UserError, match="endless leaves the end of what the assistant says out"):
        encode_dialogue(TOKENIZER, ChatTemplate("endless", without), TWO_TURNS)


def test_a_turn_that_is_written_otherwise_once_it_is_over_is_a_text_of_its_own():
    """Some leave out what the assistant thought in all turns but the last."""
    source = (
        "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' "
        "else m['content'][:3] }}{{ eos_token }}{% endfor %}"
    )
    texts = encode_dialogue(TOKENIZER, ChatTemplate("forgetful", source), TWO_TURNS)
    assert [decoded(text, text.targets) for text in texts] == [
        ["It is wide.</s>"],
        ["Nobody knows.</s>"],
    ]
    assert decoded(texts[1], ~texts[1].targets) == ["What is the sea?</s>It </s>And deep? 你好</s>"]


def test_a_last_word_of_the_user_is_left_out():
    template = ChatTemplate.named("chatml")
    longer = [*TWO_TURNS, {"role": "user", "content": "Thanks"}]
    (whole,) = encode_dialogue(TOKENIZER, template, TWO_TURNS)
    (same,) = encode_dialogue(TOKENIZER, template, longer)
    np.testing.assert_array_equal(same.ids, whole.ids)


def test_words_that_spell_an_end_token_are_words():
    template = ChatTemplate.named("chatml")
    said = "It ends with <|im_end|> they say."
    messages = [TWO_TURNS[0], {"role": "assistant", "content": said}]
    (dialogue,) = encode_dialogue(TOKENIZER, template, messages)
    end = TOKENIZER.token_id("<|im_end|>")
    assert (dialogue.ids[dialogue.targets] == end).sum() == 1
    assert TOKENIZER.decode(dialogue.ids[dialogue.targets]) == said


def test_a_template_that_rewrites_what_it_answers_is_refused():
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
    assert read_dialogue({"messages": TWO_TURNS, "id": 3}, "messages") == TWO_TURNS
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert read_dialogue({"conversations": turns}, "sharegpt") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    plain = read_dialogue({"instruction": "Add.", "input": "", "output": "5"}, "alpaca")
    assert [message["role"] for message in plain] == ["user", "assistant"]
    # As pandas writes an input that is not there.
    assert read_dialogue({"instruction": "Add.", "input": None, "output": "5"}, "alpaca") == plain


def test_a_first_turn_of_the_assistant_is_left_out_of_sharegpt():
    turns = [("gpt", "So"), ("human", "Hi"), ("gpt", "Ho")]
    turns = [{"from": role, "value": text} for role, text in turns]
    whole, rest = (read_dialogue({"conversations": t}, "sharegpt") for t in (turns, turns[1:]))
    assert whole == rest and len(rest) == 2


ALPACA_PROMPT = (
    f"{ALPACA_WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:"
)


def test_alpaca_with_an_input_is_stanfords_other_prompt():
    record = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    messages = read_dialogue(record, "alpaca")
    (dialogue,) = encode_dialogue(TOKENIZER, ChatTemplate.named("alpaca"), messages)
    assert decoded(dialogue, ~dialogue.targets) == [ALPACA_PROMPT]
    assert decoded(dialogue, dialogue.targets) == ["5</s>"]


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        ([], "messages", "must be a JSON object, not list"),
        ({}, "messages", "messages is missing; the record has no key"),
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
        ({"instruction": "x"}, "alpaca", "output is missing; the record has 'instruction'"),
        ({"instruction": "x", "output": None}, "alpaca", "output is null"),
        ({"messages": TWO_TURNS[1:]}, "messages", r"messages\[0\]: the assistant speaks first"),
        (
            {"conversations": [{"from": "gpt", "value": "Ho"}, {"from": "human", "value": "Hi"}]},
            "sharegpt",
            "the assistant says nothing",
        ),
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
            {"conversations": [{"from": ["gpt"], "value": "x"}]},
            "sharegpt",
            r"conversations\[0\] must",
        ),
        (
            {"messages": [{"role": {"name": "user"}, "content": "x"}]},
            "messages",
            r"messages\[0\]\.role must be",
        ),
        (
            {"conversations": [{"from": "gpt"}]},
            "sharegpt",
            r"messages\[0\]\.content must be a text",
        ),
    ],
)
def test_a_record_that_is_wrong_is_named(record, form, message):
    with pytest.raises(UserError, match=message):
        read_dialogue(record, form)
