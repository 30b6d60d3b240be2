"""Preparation of dialogues: what of them is learnt, from the files to the rows of a run."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from tokenizer_examples import train_chat_huggingface, train_huggingface

from instar.config import build
from instar.data.chat import ChatTemplate, encode_chat
from instar.data.dataset import TokenDataset, TokenSource
from instar.data.prepare import PrepareConfig, prepare
from instar.data.rows import BLOCK, HeldOutRows, TrainingRows
from instar.errors import UserError

S = 256
END = {"chatml": "<|im_end|>", "vicuna": "</s>"}


def dialogue(number: int, turns: int = 1) -> list[dict]:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"What is {number} and {turn}? 多"})
        messages.append({"role": "assistant", "content": f"It is {number + turn}, said Nobody 🙂."})
    return messages


def as_messages(messages: list[dict]) -> dict:
    return {"messages": messages}


def as_sharegpt(messages: list[dict]) -> dict:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    return {"id": "x", "conversations": turns}


def as_alpaca(messages: list[dict]) -> dict:
    user, assistant = messages
    return {"instruction": user["content"], "input": "", "output": assistant["content"]}


RECORDS = {"messages": as_messages, "sharegpt": as_sharegpt, "alpaca": as_alpaca}


def write_lines(path: pathlib.Path, rows: list) -> dict:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": path.stem, "kind": "jsonl", "path": str(path)}


def chats(path: pathlib.Path, dialogues: list, form: str = "messages", kind: str = "jsonl") -> dict:
    """A source of dialogues."""
    rows = [RECORDS[form](messages) for messages in dialogues]
    source = write_lines(path, rows)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    return source | {"kind": kind, "dialogue": form}


def config_of(*sources: dict, **fields) -> PrepareConfig:
    values = {
        "sources": list(sources),
        "tokenizer": {"vocab_size": 320},
        "chat_template": "chatml",
        "sequence_lengths": [S],
        "held_out": 0.2,
    }
    return build(values | fields, PrepareConfig)


def prepared(folder: pathlib.Path, *sources: dict, **fields) -> TokenDataset:
    prepare(config_of(*sources, **fields), folder / "data")
    return TokenDataset.open(folder / "data")


def text_of(dataset: TokenDataset, ids: np.ndarray) -> str:
    """The text of `ids`, with special tokens by name."""
    names = {token: name for name, token in dataset.tokenizer.special_tokens.items()}
    text = b"".join(
        names[i].encode() if i in names else dataset.tokenizer.token_bytes(i) for i in ids.tolist()
    )
    return text.decode()


def all_rows(dataset: TokenDataset, source: TokenSource, length: int = S) -> dict:
    """Enough rows of one source to see each of its rows."""
    rows = TrainingRows(dataset, sequence_length=length, weights={source.name: 1.0}, seed=0)
    count = source.pack_index("train", length).rows
    return rows.rows(np.arange(20 * count))


def learnt(dataset: TokenDataset, batch: dict) -> set[str]:
    """The runs of targets with weight 1."""
    texts = set()
    for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
        places = np.flatnonzero(weights)
        for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            texts.add(text_of(dataset, targets[run]))
    return texts


# --- What is learnt -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", END)
@pytest.mark.parametrize(
    ("form", "kind", "turns"),
    [("messages", "jsonl", 2), ("sharegpt", "json", 2), ("alpaca", "json", 1)],
)
def test_the_assistants_turns_and_their_ends_are_the_targets(tmp_path, form, kind, turns, template):
    dialogues = [dialogue(n, turns) for n in range(40)]
    source = chats(tmp_path / "a.json", dialogues, form, kind)
    dataset = prepared(tmp_path, source, chat_template=template)
    source = dataset.sources["a"]
    held_out = source.documents.held_out
    assert 0 < held_out.sum() < 40
    space = " " if template == "vicuna" else ""
    said = {
        f"{space}{message['content']}{END[template]}"
        for number in np.flatnonzero(~held_out)
        for message in dialogues[number]
        if message["role"] == "assistant"
    }
    assert learnt(dataset, all_rows(dataset, source)) == said
    sizes = [
        sum(len(f"{space}{m['content']}".encode()) for m in d if m["role"] == "assistant")
        for d in dialogues
    ]
    assert source.documents.bytes.tolist() == sizes


@pytest.mark.parametrize("template", END)
def test_the_saved_template_gives_the_ids_that_are_trained_on(tmp_path, template):
    dialogues = [dialogue(n, turns=1) for n in range(20)]
    dataset = prepared(tmp_path, chats(tmp_path / "a.jsonl", dialogues), chat_template=template)
    saved = ChatTemplate("saved", dataset.chat_template)
    for messages, ids in zip(
        dialogues, dataset.sources["a"].document_tokens(np.arange(20)), strict=True
    ):
        prompt = encode_chat(dataset.tokenizer, saved, messages[:1], add_generation_prompt=True)
        assert ids[: len(prompt)].tolist() == prompt
        assert ids[0] == dataset.tokenizer.bos_id and (ids[1:] != ids[0]).all()


def test_an_answer_may_be_a_document_of_its_own_behind_the_turns_before_it(tmp_path):
    train_chat_huggingface().save(str(tmp_path / "tokenizer.json"))
    long = [*dialogue(20), {"role": "user", "content": "x " * S}, dialogue(20)[1]]
    dataset = prepared(
        tmp_path,
        chats(tmp_path / "a.jsonl", [*(dialogue(n, turns=2) for n in range(20)), long]),
        tokenizer={"path": str(tmp_path / "tokenizer.json")},
        chat_template="baichuan2",
        held_out=0.0,
    )
    source = dataset.sources["a"]
    assert (source.facts["documents"], source.facts["skipped"]) == (42, 0)
    assert source.facts["rows"] == {str(S): {"cut": 0, "too_long": 1}}
    texts = [text_of(dataset, ids) for ids in source.document_tokens(np.arange(2))]
    first, second = (f"<reserved_106>What is 0 and {n}? 多<reserved_107>It is {n}" for n in (0, 1))
    said = ", said Nobody 🙂."
    assert texts == [f"{first}{said}</s>", f"{first}{said}{second}{said}</s>"]
    assert learnt(dataset, all_rows(dataset, source)) == {f"It is {n}{said}</s>" for n in range(21)}


def test_a_template_from_a_file_is_kept(tmp_path):
    path = tmp_path / "mine.jinja"
    source = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    path.write_text(source + "{% if add_generation_prompt %}[assistant]{% endif %}")
    dialogues = chats(tmp_path / "a.jsonl", [dialogue(n) for n in range(20)])
    dataset = prepared(tmp_path, dialogues, chat_template=str(path))
    assert dataset.chat_template == path.read_text()
    ids = dataset.sources["a"].document_tokens([3])[0]
    user, assistant = (message["content"] for message in dialogue(3))
    assert text_of(dataset, ids) == f"[user]{user}</s>[assistant]{assistant}</s>"


def test_rows_hold_whole_dialogues_apart(tmp_path):
    dialogues = [dialogue(n, turns=n % 3 + 1) for n in range(60)]
    source = chats(tmp_path / "a.jsonl", dialogues)
    dataset = prepared(tmp_path, source, packing="concat", record_tokens=7, shard_tokens=900)
    source = dataset.sources["a"]
    index = source.pack_index("train", S)
    assert (index.start == 0).all()
    assert index.length.tolist() == source.documents.tokens[index.document].tolist()
    assert len(source.facts["shards"]) > 2 and index.rows < len(index.document)
    batch = all_rows(dataset, source)
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        begins = np.flatnonzero(np.diff(segments, prepend=0) > 0)
        assert (tokens[begins] == dataset.tokenizer.bos_id).all()
        assert (tokens == dataset.tokenizer.bos_id).sum() == len(begins)


def test_rows_of_each_length_hold_dialogues_cut_at_a_turn(tmp_path, capsys):
    long = [{"role": "user", "content": "x " * S}, {"role": "assistant", "content": "No."}]
    dialogues = [*(dialogue(n) for n in range(20)), dialogue(20, turns=60), long]
    lengths = [S, S // 2]
    source = chats(tmp_path / "a.jsonl", dialogues)
    dataset = prepared(tmp_path, source, sequence_lengths=lengths, held_out=0.0)
    source, told = dataset.sources["a"], " ".join(capsys.readouterr().err.split())
    assert (source.facts["documents"], source.facts["skipped"]) == (22, 0)
    assert source.facts["rows"] == {str(n): {"cut": 1, "too_long": 1} for n in lengths}
    # In turn the user's and the assistant's.
    ids = source.document_tokens([20])[0]
    ends = np.flatnonzero(ids == dataset.tokenizer.token_id("<|im_end|>"))[1::2] + 1
    for length in lengths:
        assert f"a in rows of {length} tokens: 1 dialogues cut, 1 too long" in told
        index, kept = source.pack_index("train", length), ends[ends <= length + 1]
        assert sorted(index.document.tolist()) == list(range(21)) and not index.start.any()
        assert index.length[index.document == 20] == kept[-1]
        assert learnt(dataset, all_rows(dataset, source, length)) == {
            f"It is {n}, said Nobody 🙂.<|im_end|>" for n in range(20 + len(kept))
        }


def test_the_bytes_of_held_out_dialogues_are_those_of_the_turns_in_the_rows(tmp_path):
    dialogues = [dialogue(n, turns=6) for n in range(30)]
    source = chats(tmp_path / "a.jsonl", dialogues)
    dataset = prepared(tmp_path, source, sequence_lengths=[S, S // 2], held_out=0.5)
    sums = []
    for length in (S, S // 2):
        rows = HeldOutRows(dataset, sequence_length=length, weights={}, batch=4)
        ids = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in rows])
        size = len(text_of(dataset, ids).replace("<|im_end|>", "").encode())
        assert rows.tokens_per_byte == pytest.approx(len(ids) / size)
        sums.append(len(ids))
    assert sums[0] > sums[1] > 0


def test_a_preparation_that_an_earlier_release_began_is_done_again(tmp_path):
    """It counted what was cut, and did not write where turns end."""
    source = chats(tmp_path / "a.jsonl", [dialogue(n) for n in range(20)])
    config, folder = config_of(source, shard_tokens=100), tmp_path / "data"
    whole = prepare(config, folder)
    (folder / "manifest.json").unlink()
    for path in (folder / "a").glob("turns*"):
        path.unlink()
    progress = json.loads((folder / "a" / "progress.json").read_text())
    progress["cursor"] |= {"cut": 0, "too_long": 0}
    (folder / "a" / "progress.json").write_text(json.dumps(progress))
    assert prepare(config, folder) == whole
    assert (folder / "a" / "turns.npz").exists()


def test_a_source_of_which_nothing_fits(tmp_path):
    source = chats(tmp_path / "a.jsonl", [dialogue(n) for n in range(20)])
    with pytest.raises(UserError, match="none of its 20 dialogues fits into 8 tokens"):
        prepare(config_of(source, sequence_lengths=[8]), tmp_path / "data")
    # What it says is to be done can be done.
    prepare(config_of(source, sequence_lengths=[8, S]), tmp_path / "data")


# --- Beside texts -------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path) -> TokenDataset:
    texts = [{"text": f"{n} is a number, and so is {n + 1}. " * 5} for n in range(60)]
    return prepared(
        tmp_path,
        write_lines(tmp_path / "texts.jsonl", texts),
        chats(tmp_path / "chats.jsonl", [dialogue(n, turns=2) for n in range(60)]),
    )


def test_a_mixture_learns_all_of_a_text_and_the_answers_of_a_dialogue(mixture):
    rows = TrainingRows(mixture, sequence_length=S, weights={"texts": 0.1, "chats": 0.9}, seed=3)
    numbers = np.arange(300)
    which, _ = rows.locate(numbers)
    batch = rows.rows(numbers)
    assert 0.05 < (which == 0).mean() < 0.15
    same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    within = same & (batch["segment_ids"][:, 1:] > 0)
    weights = batch["weights"][:, :-1] > 0
    np.testing.assert_array_equal(weights[which == 0], within[which == 0])
    share = weights[which == 1].sum() / within[which == 1].sum()
    assert 0.2 < share < 0.8
    one = TrainingRows(mixture, sequence_length=S, weights={"texts": 0.1, "chats": 0.9}, seed=3)
    for k in (0, 17, 299):
        for name, values in one.rows(np.asarray([k])).items():
            np.testing.assert_array_equal(values[0], batch[name][k])


def test_without_weights_sources_are_drawn_by_their_targets(mixture):
    rows = TrainingRows(mixture, sequence_length=S, weights={}, seed=0)
    which, _ = rows.locate(np.arange(BLOCK))
    texts = mixture.sources["texts"].pack_index("train", S).targets
    trained = mixture.sources["chats"].documents.of("train")
    said = [message["content"] for n in trained for message in dialogue(n, turns=2)[1::2]]
    answers = sum(len(mixture.tokenizer.encode(content)) + 1 for content in said)
    assert (which == 0).mean() == pytest.approx(texts / (texts + answers), abs=2 / BLOCK)


@pytest.mark.parametrize(
    ("weights", "judged", "read"),
    [
        ({}, (), {"texts", "chats"}),
        ({"texts": 1.0, "chats": 0.0}, (), {"texts"}),
        ({"chats": 2.0}, (), {"chats"}),
        ({"texts": 0.1, "chats": 0.9}, ("chats",), {"chats"}),
        ({"texts": 1.0}, ("chats",), {"texts"}),
    ],
)
def test_held_out_rows_are_of_what_training_reads_and_of_what_is_judged(
    mixture, weights, judged, read
):
    rows = HeldOutRows(mixture, sequence_length=S, weights=weights, batch=3, judged=judged)
    sources = [mixture.sources[name] for name in read]
    targets = sum(s.predicted(s.pack_index("held_out", S)) for s in sources)
    assert sum(batch["weights"].sum() for batch in rows) == targets > 0
    size = sum(s.documents.bytes[s.documents.held_out].sum() for s in sources)
    assert rows.tokens_per_byte == pytest.approx(targets / size)


def test_the_split_does_not_depend_on_the_form(tmp_path):
    dialogues = [dialogue(n) for n in range(60)]
    forms = [chats(tmp_path / f"{form}.jsonl", dialogues, form) for form in RECORDS]
    dataset = prepared(tmp_path, *forms)
    splits = [source.documents.held_out.tolist() for source in dataset.sources.values()]
    assert splits[0] == splits[1] == splits[2] and 0 < sum(splits[0]) < 60
    other = prepare(dataclasses.replace(config_of(*forms), seed=1), tmp_path / "other")
    assert other["sources"]["alpaca"]["splits"] != dataset.sources["alpaca"].facts["splits"]


# --- What is wrong ------------------------------------------------------------------------------


def test_broken_records_are_listed_with_their_reasons(tmp_path):
    rows = [as_messages(dialogue(n)) for n in range(20)]
    rows[4] = {"messages": [{"role": "bot", "content": "x"}]}
    rows[9] = ["no object"]
    # A template may refuse what is a dialogue all the same: two questions in a row.
    rows[12] = as_messages([dialogue(0)[0], *dialogue(1)])
    source = write_lines(tmp_path / "a.jsonl", rows) | {"dialogue": "messages"}
    dataset = prepared(tmp_path, source, chat_template="llama2")
    assert dataset.sources["a"].facts["documents"] == 17
    assert dataset.sources["a"].facts["skipped"] == 3
    lines = (tmp_path / "data" / "a" / "skipped.jsonl").read_text().splitlines()
    listed = {r["position"]: r["reason"] for r in map(json.loads, lines)}
    assert list(listed) == [4, 9, 12]
    for position, words in {4: "role must be one of", 9: "no JSON object", 12: "llama2"}.items():
        assert words in listed[position]


def test_a_source_of_another_format_is_refused(tmp_path):
    source = chats(tmp_path / "a.jsonl", [dialogue(n) for n in range(20)])
    texts = write_lines(tmp_path / "b.jsonl", [{"text": f"It is {n}, 多 🙂."} for n in range(20)])
    config = config_of(texts, source | {"dialogue": "sharegpt"}, tokenizer={"vocab_size": 305})
    with pytest.raises(UserError, match=r"20 of 20 records are broken.*conversations.*dialogue"):
        prepare(config, tmp_path / "data")


@pytest.mark.parametrize(
    ("fields", "dialogue_form", "message"),
    [
        ({"chat_template": None}, "messages", "chat_template must say how .* source a"),
        ({"chat_template": "chatnl"}, "messages", "must be one of .*chatml.*not 'chatnl'"),
        ({}, None, "chat_template is for dialogues"),
    ],
)
def test_a_template_where_it_is_needed_and_only_there(tmp_path, fields, dialogue_form, message):
    source = {"name": "a", "kind": "jsonl", "path": "x.jsonl", "dialogue": dialogue_form}
    with pytest.raises(UserError, match=message):
        config_of(source, **fields)


def test_dialogues_come_in_json():
    source = {"name": "a", "kind": "csv", "path": "x.csv", "dialogue": "messages"}
    with pytest.raises(UserError, match=r"source a: sources\.kind must be jsonl or json"):
        config_of(source)


def test_a_template_that_cannot_be_used_leaves_nothing_behind(tmp_path):
    source = chats(tmp_path / "a.jsonl", [dialogue(n) for n in range(20)])
    train_huggingface().save(str(tmp_path / "tokenizer.json"))
    tokenizer = {"path": str(tmp_path / "tokenizer.json")}
    endless = tmp_path / "endless.jinja"
    endless.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    for name, message in {
        "chatml": r"needs the token '<\|im_start\|>'",
        str(endless): "writes no special token",
        str(tmp_path / "absent.jinja"): "absent.jinja cannot be read",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(config_of(source, tokenizer=tokenizer, chat_template=name), tmp_path / "data")
        assert not (tmp_path / "data").exists()


def test_a_template_that_refuses_all_can_be_mended(tmp_path):
    source = chats(tmp_path / "a.jsonl", [dialogue(n, turns=2) for n in range(20)])
    path, template = tmp_path / "mine.jinja", ChatTemplate.named("chatml").source
    path.write_text("{% if messages | length > 2 %}{{ fail() }}{% endif %}" + template)
    with pytest.raises(UserError, match="20 of 20 records are broken"):
        prepare(config_of(source, chat_template=str(path)), tmp_path / "data")
    path.write_text(template)
    assert prepared(tmp_path, source, chat_template=str(path)).chat_template == template


def test_a_bos_is_written_where_texts_of_the_tokenizer_begin_with_one(tmp_path):
    """And nowhere else: of some tokenizers the BOS is what a template begins each turn with."""
    source = chats(tmp_path / "a.jsonl", [dialogue(n) for n in range(40)])
    dataset = prepared(tmp_path / "trained", source, chat_template="vicuna")
    assert dataset.chat_template.startswith("{{ bos_token }}")
    (ids,) = dataset.sources["a"].document_tokens([0])
    assert ids[0] == dataset.tokenizer.bos_id and ids[1] != ids[0]
    train_huggingface().save(str(tmp_path / "tokenizer.json"))
    known = {"path": str(tmp_path / "tokenizer.json")}
    dataset = prepared(tmp_path / "known", source, chat_template="vicuna", tokenizer=known)
    assert not dataset.tokenizer.adds_bos
    assert dataset.chat_template == ChatTemplate.named("vicuna").source
    (ids,) = dataset.sources["a"].document_tokens([0])
    assert ids[0] != dataset.tokenizer.bos_id
