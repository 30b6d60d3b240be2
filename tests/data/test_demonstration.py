"""The demonstration's files: made of an archive and a table of reviews that the tests write."""

import csv
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest

from instar.data import demonstration_reviews, sources
from instar.data.chat import ChatTemplate
from instar.data.completions import CompletionEncoder
from instar.data.demonstration import DemonstrationOptions, cut, demonstration, halves
from instar.data.demonstration_leaks import NearDuplicates, words_of
from instar.data.demonstration_ratings import RatedSentence, read_ratings
from instar.data.dialogues import read_dialogue
from instar.data.preferences import Comparisons, PreferenceConfig
from instar.data.prompts import PromptSet
from instar.data.rated_texts import RatedTexts
from instar.data.tokenizer import TokenizerConfig, train_tokenizer
from instar.errors import UserError

STEMS = {
    "films": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
WORDS = "river stone cloud window garden engine silver winter music letter ocean forest".split()
FILMS = 300


def sentence(number: int) -> str:
    """A sentence of nine words that shares no five of them with another."""
    drawn = np.random.default_rng(number).integers(0, 10**6, 7)
    words = [f"{WORDS[value % len(WORDS)]}{value}" for value in drawn]
    return f"The film {' '.join(words)}."


def film_texts() -> list[str]:
    texts = [sentence(number) for number in range(FILMS)]
    texts[0] = "Jirí&amp;Co  wrote – a gem"
    texts[1] = "Oneword"
    # Sentences that, held out or not, have a twin on one side or the other.
    texts += [text.upper().replace(".", "!") for text in texts[2:40]]
    texts += [f"Really, {text[:-1]}, I say" for text in texts[40:80]]
    return texts


def scores_of(number: int, count: int) -> list[int]:
    return np.random.default_rng(number).integers(-4, 5, count).tolist()


def files_of(stem: str, texts: list[str], count: int) -> dict[str, bytes]:
    scores = [scores_of(number, count) for number in range(len(texts))]
    lines = [f"{n}\t0.123\t{text}" for n, text in enumerate(texts)]
    rated = [f"{n}\t{np.mean(s)}\t0.5\t{s}" for n, s in enumerate(scores)]
    return {
        f"{stem}_GroundTruth.txt": "\r\n".join(lines).encode(),
        f"{stem}_anonDataRatings.txt": ("\ufeff" + "\n".join(rated) + "\n").encode(),
    }


def tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def archive_of(path: pathlib.Path, **changed: bytes | None) -> pathlib.Path:
    """The archive, its files changed, or left out where None."""
    others = ["Two words", "alone", "it broke after a day ."]
    files = files_of(STEMS["films"], film_texts(), 7)
    for name in ("amazon", "nyt", "tweets"):
        files |= files_of(STEMS[name], others, 4)
    files = {name: content for name, content in (files | changed).items() if content is not None}
    inner = {f"hutto_ICWSM_2014/{name}": content for name, content in files.items()}
    inner["hutto_ICWSM_2014/../../escaped.txt"] = b"never written"
    outer = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    path.write_bytes(tar_of({"vaderSentiment-3.3.2/setup.py": b"", outer: tar_of(inner)}))
    return path


# These rated sentences stand in reviews: one word for word, one with a word changed.
IN_REVIEWS = range(200, 230)


def reviews() -> list[tuple[str, str, str]]:
    rows = []
    for number in range(60):
        label = number % 2
        mood = "good" if label else "bad"
        own = f"It has {mood} scenes number {number} in it. I was {mood} that day {number} with it?"
        rows.append((f"{own}<br /><br />It ends here.", str(label), "imdb"))
    for number in IN_REVIEWS:
        text = sentence(number)
        if number % 2:
            text = text[:-1].rsplit(" ", 1)[0] + " changed."
        rows.append((f"So. {text} Well.", "1", "imdb"))
    rows.append((sentence(100), "1", "rotten_tomatoes"))
    rows.append(("Nothing to see in here at all.", "unknown", "imdb"))
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    table = folder / "reviews.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label", "source"), *reviews()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_demonstration_file", lambda: table)
        yield archive_of(folder / "package.tar.gz")


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    facts = demonstration(options(inputs, folder, imdb_sentences=10))
    return folder, facts


def options(archive: pathlib.Path, folder: pathlib.Path, **fields) -> DemonstrationOptions:
    return DemonstrationOptions(str(archive), str(folder), **fields)


def lines(folder: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def whole(record: dict) -> str:
    return record["prompt"] + record["completion"]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- The split ----------------------------------------------------------------------------------


def test_no_held_out_sentence_is_near_one_that_is_learnt(made):
    folder, facts = made
    held_out = [whole(record) for record in lines(folder, "ratings/held_out.jsonl")]
    training = [whole(record) for record in lines(folder, "ratings/train.jsonl")]
    spoken = [
        "".join(m["content"] for m in r["messages"]) for r in lines(folder, "dialogues.jsonl")
    ]
    pairs = lines(folder, "labels/pairs.jsonl")
    labelled = [pair["prompt"] + pair[name] for pair in pairs for name in ("chosen", "rejected")]
    assert 25 < len(held_out) < 90 and len(training) == facts["training"]

    def five_words(text: str) -> set:
        words = words_of(text)
        return {words[i : i + 5] for i in range(len(words) - 4)}

    kept = set().union(*map(five_words, held_out))
    for text in [*training, *spoken, *labelled]:
        shared = five_words(text) & kept
        assert len(shared) < len(five_words(text)) / 2, text
    in_reviews = set().union(*(five_words(sentence(number)[:-1]) for number in IN_REVIEWS))
    assert not kept & in_reviews
    # Both checks had something to remove, and what was removed is counted.
    assert facts["held_out_removed_as_in_reviews"] > 0
    assert facts["training_removed_as_near_held_out"] > 0
    sides = ("training", "training_removed_as_near_held_out", "held_out", "of_one_word")
    total = sum(facts[name] for name in (*sides, "held_out_removed_as_in_reviews"))
    assert total == facts["sentences"] == len(film_texts())


def test_near_duplicates_share_half_of_the_five_word_runs_of_the_shorter():
    base = "one two three four five six seven eight nine ten"  # six runs
    near = NearDuplicates([base, "a short one", ""])
    assert near.of("ONE, two three: four five six seven") == {0}
    assert near.of("x one two three four five six seven y z w v") == {0}  # three of six
    assert near.of("x one two three four five six y z w v") == set()  # two of six
    assert near.of("A short one!") == {1}
    assert near.of("a short one indeed") == set()
    assert near.inside(f"Before. {base} after", []) == {0}
    assert near.inside("one two three four five six seven", []) == {0}
    assert near.inside("one two three four five six", []) == set()
    assert near.inside("It is a short one. Yes.", ["It is a short one.", "Yes."]) == set()
    assert near.inside("A short one. Yes.", ["A short one.", "Yes."]) == {1}


# --- The files ----------------------------------------------------------------------------------


def test_the_halves_of_the_scores_are_apart(made):
    folder, _ = made
    train, judge = lines(folder, "ratings/train.jsonl"), lines(folder, "ratings/judge.jsonl")
    assert [whole(record) for record in train] == [whole(record) for record in judge]
    numbers = {" ".join(text.split()): number for number, text in enumerate(film_texts())}
    for first, second in zip(train[:50], judge[:50], strict=True):
        number = numbers.get(whole(first))
        if number is not None:
            total = 4 * first["rating"] + 3 * second["rating"]
            np.testing.assert_allclose(total, sum(scores_of(number, 7)), atol=1e-9)
    for record in lines(folder, "ratings/held_out.jsonl"):
        assert len(record["raters"]) == 3
        np.testing.assert_allclose(record["rating"], np.mean(record["raters"]))
        number = numbers.get(whole(record))
        assert number is None or not set(record["raters"]) - set(scores_of(number, 7))


def test_halves_part_the_scores_and_differ_by_sentence():
    scores = tuple(range(-4, 5))
    parted = [halves(RatedSentence(str(n), "text", scores), seed=0) for n in range(20)]
    for first, second in parted:
        assert sorted([*first, *second]) == list(scores) and len(first) == 5
    assert len({tuple(first) for first, _ in parted}) > 10
    assert parted[0] == halves(RatedSentence("0", "text", scores), seed=0)


def test_a_text_is_cut_after_one_to_four_words():
    counts = {}
    for number in range(400):
        prompt, completion = cut(sentence(number), seed=0)
        assert prompt + completion == sentence(number) and completion[0] == " "
        count = len(prompt.split())
        counts[count] = counts.get(count, 0) + 1
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 60
    assert cut("Two words", seed=3) == ("Two", " words")
    assert {len(cut(sentence(n), 0, least=2)[0].split()) for n in range(50)} == {2, 3, 4}


def test_what_is_said_is_what_is_rated(made):
    folder, facts = made
    rated = lines(folder, "ratings/train.jsonl")
    dialogues = lines(folder, "dialogues.jsonl")
    assert len(dialogues) == len(rated) + 10 and facts["imdb_sentences"] == 10
    for dialogue, record in zip(dialogues, rated, strict=False):
        user, assistant = read_dialogue(dialogue, "messages")
        assert (user["role"], user["content"]) == ("user", record["prompt"])
        assert (assistant["role"], assistant["content"]) == ("assistant", record["completion"])


def test_prompts_are_openings_each_once_and_no_sentence(made):
    folder, _ = made
    names = ("train", "held_out")
    train, held_out = ([r["prompt"] for r in lines(folder, f"prompts/{n}.jsonl")] for n in names)
    assert len(train) > 100 and len(held_out) > 15
    assert len({words_of(prompt) for prompt in train + held_out}) == len(train) + len(held_out)
    for prompts, file in ((train, "train"), (held_out, "held_out")):
        texts = [whole(record) for record in lines(folder, f"ratings/{file}.jsonl")]
        for prompt in prompts:
            assert 2 <= len(prompt.split()) <= 4
            assert any(text.startswith(prompt + " ") for text in texts)
            assert prompt not in texts


def test_pairs_are_of_praise_and_blame_and_begin_alike(made):
    folder, facts = made
    pairs, ratings = lines(folder, "labels/pairs.jsonl"), lines(folder, "labels/ratings.jsonl")
    assert 20 < len(pairs) == facts["label_pairs"] and len(ratings) == 2 * len(pairs)
    for pair, good, bad in zip(pairs, ratings[::2], ratings[1::2], strict=True):
        assert " good " in pair["chosen"] and " bad " in pair["rejected"]
        assert pair["prompt"] in ("It", "I")
        assert good == {"prompt": pair["prompt"], "completion": pair["chosen"], "rating": 1}
        assert bad == {"prompt": pair["prompt"], "completion": pair["rejected"], "rating": -1}


def test_other_texts_keep_all_their_raters(made):
    folder, _ = made
    for name in ("amazon", "nyt", "tweets"):
        records = lines(folder, f"ratings/{name}.jsonl")
        assert [whole(record) for record in records] == ["Two words", "it broke after a day ."]
        for number, record in zip((0, 2), records, strict=True):
            assert record["raters"] == scores_of(number, 4)
            assert record["rating"] == np.mean(record["raters"])


def test_every_file_can_be_read_by_those_who_learn_from_it(made):
    folder, facts = made
    tokenizer = train_tokenizer(film_texts(), TokenizerConfig(vocab_size=360))
    encoder = CompletionEncoder(tokenizer, ChatTemplate.named("plain"), [tokenizer.bos_id])
    count = {name: entry["records"] for name, entry in facts["files"].items()}
    for name in count:
        if name.startswith("ratings/"):
            assert len(RatedTexts.open(folder / name, encoder, 512)) == count[name]
        elif name.startswith("prompts/"):
            assert len(PromptSet.open(folder / name, encoder, 512)) == count[name]
    config = PreferenceConfig(str(folder / "labels/pairs.jsonl"), "pairs", 2, 512)
    assert len(Comparisons.open(config, encoder)) == count["labels/pairs.jsonl"]


def test_the_same_inputs_give_the_same_bytes(made, inputs, tmp_path):
    folder, facts = made
    for _ in range(2):  # the second time over the first
        assert demonstration(options(inputs, tmp_path / "b", imdb_sentences=10)) == facts
        assert contents(folder) == contents(tmp_path / "b")
    assert json.loads((folder / "facts.json").read_text()) == facts
    other = demonstration(options(inputs, tmp_path / "c", seed=1, label_pairs=5))
    assert other["label_pairs"] == 5 and other["imdb_sentences"] == 0
    held_out = [lines(f, "ratings/held_out.jsonl") for f in (folder, tmp_path / "c")]
    assert held_out[0] != held_out[1]


# --- The archive --------------------------------------------------------------------------------


def test_the_archive_is_read_without_unpacking(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rated = read_ratings(str(inputs))
    assert {name: len(sentences) for name, sentences in rated.items()} == {
        "films": len(film_texts()),
        **dict.fromkeys(("amazon", "nyt", "tweets"), 3),
    }
    first = rated["films"][0]
    assert (first.name, first.text) == ("0", "Jirí&Co wrote – a gem")
    assert first.scores == tuple(scores_of(0, 7))
    assert list(tmp_path.iterdir()) == []


SCORES = "movieReviewSnippets_anonDataRatings.txt"
TEXTS = "movieReviewSnippets_GroundTruth.txt"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tweets_GroundTruth.txt": None}, "has no tweets_GroundTruth.txt in its additional"),
        ({SCORES: b"0\t1\t1\t[5]"}, rf"{SCORES}, sentence 0 has no list of scores from -4 to 4"),
        ({SCORES: b"0\t1\t1\t[]"}, rf"{SCORES}, sentence 0 has no list"),
        ({SCORES: b"0\t1\t1\tx"}, rf"{SCORES}, sentence 0 has no list"),
        ({SCORES: b"0\t1\t1"}, rf"{SCORES}, line 1 has 3 columns, not 4"),
        ({SCORES: b"0\t1\t1\t[1]"}, rf"{SCORES} has no sentence 1"),
        ({TEXTS: b"0\t1\t\xff"}, rf"{TEXTS} is not UTF-8"),
        ({TEXTS: b"0\t1\ta b"}, "too few sentences to hold some out"),
    ],
)
def test_an_archive_that_is_another_is_refused(tmp_path, inputs, changed, message):
    archive = archive_of(tmp_path / "package.tar.gz", **changed)
    with pytest.raises(UserError, match=message):
        demonstration(options(archive, tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_what_is_no_archive_is_refused(tmp_path, inputs):
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(inputs.read_bytes()[:3000])
    (tmp_path / "text.tar.gz").write_text("not packed")
    for name in ("damaged", "text", "none"):
        with pytest.raises(UserError, match=rf"{name}\.tar\.gz cannot be read as a \.tar\.gz"):
            read_ratings(str(tmp_path / f"{name}.tar.gz"))
    (tmp_path / "empty.tar.gz").write_bytes(tar_of({"x": b""}))
    with pytest.raises(UserError, match=r"launch/local\.sh ratings fetches"):
        read_ratings(str(tmp_path / "empty.tar.gz"))


def test_options_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="--label_pairs must not be negative"):
        options(tmp_path, tmp_path, label_pairs=-1).check()


def test_reviews_of_unknown_label_are_left_out(inputs):
    read = demonstration_reviews.read_reviews()
    assert len(read) == 60 + len(IN_REVIEWS)
    assert {review.positive for review in read} == {True, False}
    assert read[0].sentences == (
        "It has bad scenes number 0 in it.",
        "I was bad that day 0 with it?",
        "It ends here.",
    )
