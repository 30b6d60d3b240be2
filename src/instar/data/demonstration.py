"""`instar demonstration`: what the stages after pretraining learn from, made of people's ratings.

Two public packages give it: sentences of film reviews with 15 to 29 people's scores each (see
`demonstration_ratings`), and the IMDb reviews that the model was pretrained on, each with a label.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath
from rich.console import Console

from instar.data.demonstration_leaks import SHARE, SHINGLE, NearDuplicates, words_of
from instar.data.demonstration_ratings import RatedSentence, read_ratings
from instar.data.demonstration_reviews import (
    Review,
    chosen_sentences,
    fitting_sentences,
    labelled_pairs,
    read_reviews,
)
from instar.data.prepare_config import draw
from instar.data.source_writer import write_text
from instar.data.streams import file_digest
from instar.errors import UserError
from instar.workdir import write_json

HELD_OUT = 0.15
FACTS = "facts.json"

Records = dict[str, list[dict]]


@dataclass(frozen=True)
class DemonstrationOptions:
    """Makes the demonstration's files of people's ratings of sentences.

    `ratings` is the source distribution vaderSentiment-3.3.2.tar.gz, which `launch/local.sh
    ratings` fetches; `to` is the folder to write. `seed` decides what is held out and how
    sentences are cut in two. `label_pairs` is how many pairs of IMDb's sentences there are at most.
    `imdb_sentences` adds so many of IMDb's sentences to the dialogues; none by default, for their
    style is another: 25 % are in the first person and 14 % have a hyphen, and of the rated ones
    5 % and none.
    """

    ratings: str
    to: str
    seed: int = 0
    label_pairs: int = 20_000
    imdb_sentences: int = 0

    def check(self) -> None:
        """Raises UserError for counts that cannot be."""
        for name in ("label_pairs", "imdb_sentences"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative ({getattr(self, name)})")


def demonstration(options: DemonstrationOptions) -> dict:
    """Writes the files into ``options.to``, facts.json last, and returns what that says.

    A sentence is cut into a prompt, its first words, and a completion, the rest with its leading
    space. The same inputs and options give the same bytes.

    - dialogues.jsonl: the training sentences (and IMDb's, if any), as a user's words and an
      assistant's;
    - ratings/train.jsonl, ratings/judge.jsonl: the same sentences with the mean of one half of
      the people's scores each, so that whoever judges has asked other people than who learnt;
    - ratings/held_out.jsonl: held-out sentences, the mean of the second half and its scores;
    - ratings/amazon.jsonl, nyt.jsonl, tweets.jsonl: other texts than reviews of films;
    - labels/pairs.jsonl, labels/ratings.jsonl: sentences of reviews that praise (chosen, 1) and
      of reviews that do not (rejected, -1);
    - prompts/train.jsonl, prompts/held_out.jsonl: first words to go on from.

    Raises:
      UserError: the archive or the reviews cannot be read, or the folder cannot be written.
    """
    rated = read_ratings(options.ratings)
    reviews = read_reviews()
    training, held_out, facts = _split(rated["films"], reviews, options.seed)
    known = NearDuplicates([sentence.text for sentence in held_out])
    sentences = fitting_sentences(reviews)
    labels, label_facts = _labels(sentences, known, options)
    more = chosen_sentences(sentences, options.imdb_sentences, known, options.seed)
    texts = [*(sentence.text for sentence in training), *more]
    files = {
        "dialogues.jsonl": [_dialogue(text, options.seed) for text in texts],
        **_films(training, held_out, options.seed),
        **_other_ratings(rated, options.seed),
        **_prompts(training, held_out, options.seed),
        **labels,
    }
    facts = {
        "seed": options.seed,
        "archive": file_digest(options.ratings, "--ratings"),
        "near_duplicates": {"words": SHINGLE, "share": SHARE},
        **facts,
        "imdb_sentences": len(more),
        **label_facts,
    }
    facts = _write(epath.Path(options.to), files, facts)
    Console(stderr=True).print(
        f"{options.to}: {len(training):,} sentences to learn from, {len(held_out):,} held out, "
        f"{facts['label_pairs']:,} pairs by label"
    )
    return facts


# ---------------------------------------------------------------------------------------------
# Sentences
# ---------------------------------------------------------------------------------------------


def _split(
    films: Sequence[RatedSentence], reviews: Sequence[Review], seed: int
) -> tuple[list[RatedSentence], list[RatedSentence], dict]:
    """Training and held-out sentences, without what one would know of the other, and counts."""
    whole = [sentence for sentence in films if " " in sentence.text]
    drawn: dict[bool, list[RatedSentence]] = {True: [], False: []}
    for sentence in whole:
        # By its words: copies of a sentence fall on one side.
        number = draw(" ".join(words_of(sentence.text)), f"held out\0{seed}")
        drawn[number < HELD_OUT].append(sentence)
    near = NearDuplicates([sentence.text for sentence in drawn[True]])
    read = {i for review in reviews for i in near.inside(review.text, review.sentences)}
    held_out = [sentence for i, sentence in enumerate(drawn[True]) if i not in read]
    near = NearDuplicates([sentence.text for sentence in held_out])
    training = [sentence for sentence in drawn[False] if not near.of(sentence.text)]
    if not training or not held_out:
        raise UserError("--ratings has too few sentences to hold some out: give the whole archive")
    facts = {
        "sentences": len(films),
        "of_one_word": len(films) - len(whole),
        "training": len(training),
        "training_removed_as_near_held_out": len(drawn[False]) - len(training),
        "held_out": len(held_out),
        "held_out_removed_as_in_reviews": len(drawn[True]) - len(held_out),
    }
    return training, held_out, facts


def cut(text: str, seed: int, least: int = 1, most: int = 4) -> tuple[str, str]:
    """A text of at least two words as its first `least` to `most` words, and the rest.

    How many is drawn by the text; one word at least is left over.
    """
    words = text.split(" ")
    most = min(most, len(words) - 1)
    count = least + int(draw(text, f"cut {least}\0{seed}") * (most - least + 1))
    opening = " ".join(words[: min(count, most)])
    return opening, text[len(opening) :]


def halves(sentence: RatedSentence, seed: int) -> tuple[list[float], list[float]]:
    """A sentence's scores, parted at random; of an odd number the first half has one more."""
    order = sorted(
        range(len(sentence.scores)),
        key=lambda i: draw(f"{sentence.name}\0{sentence.text}\0{i}", f"halves\0{seed}"),
    )
    middle = (len(order) + 1) // 2
    first, second = sorted(order[:middle]), sorted(order[middle:])
    return [sentence.scores[i] for i in first], [sentence.scores[i] for i in second]


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def _rating(text: str, scores: Sequence[float], seed: int, raters: bool) -> dict:
    prompt, completion = cut(text, seed)
    record = {"prompt": prompt, "completion": completion, "rating": sum(scores) / len(scores)}
    return record | ({"raters": list(scores)} if raters else {})


def _dialogue(text: str, seed: int) -> dict:
    prompt, completion = cut(text, seed)
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant"}
    return {"messages": [user, assistant | {"content": completion}]}


def _films(
    training: Sequence[RatedSentence], held_out: Sequence[RatedSentence], seed: int
) -> Records:
    # A sentence with a single score cannot be parted; the real data have none.
    parted = [(each.text, halves(each, seed)) for each in training]
    judged = [(each.text, halves(each, seed)[1]) for each in held_out]
    return {
        "ratings/train.jsonl": [_rating(text, first, seed, False) for text, (first, _) in parted],
        "ratings/judge.jsonl": [_rating(text, last, seed, False) for text, (_, last) in parted],
        "ratings/held_out.jsonl": [_rating(text, last, seed, True) for text, last in judged],
    }


def _other_ratings(rated: dict[str, list[RatedSentence]], seed: int) -> Records:
    return {
        f"ratings/{name}.jsonl": [
            _rating(each.text, each.scores, seed, True) for each in sentences if " " in each.text
        ]
        for name, sentences in rated.items()
        if name != "films"
    }


def _prompts(
    training: Sequence[RatedSentence], held_out: Sequence[RatedSentence], seed: int
) -> Records:
    """Openings of two to four words, each once, none of which is a sentence that ends there."""
    seen = {words_of(each.text) for each in (*training, *held_out)}
    files: Records = {}
    for name, sentences in (("train", training), ("held_out", held_out)):
        files[f"prompts/{name}.jsonl"] = prompts = []
        for sentence in sentences:
            if sentence.text.count(" ") < 4:
                continue
            opening, _ = cut(sentence.text, seed, least=2)
            words = words_of(opening)
            if words not in seen and opening[-1] not in ".!?":
                seen.add(words)
                prompts.append({"prompt": opening})
    return files


def _labels(
    sentences: dict[bool, list[str]], held_out: NearDuplicates, options: DemonstrationOptions
) -> tuple[Records, dict]:
    pairs, near = labelled_pairs(sentences, options.label_pairs, held_out, options.seed)
    comparisons, ratings = [], []
    for praise, blame in pairs:
        word = praise.split(" ")[0]
        chosen, rejected = praise[len(word) :], blame[len(word) :]
        comparisons.append({"prompt": word, "chosen": chosen, "rejected": rejected})
        for completion, rating in ((chosen, 1), (rejected, -1)):
            ratings.append({"prompt": word, "completion": completion, "rating": rating})
    files = {"labels/pairs.jsonl": comparisons, "labels/ratings.jsonl": ratings}
    return files, {"label_pairs": len(pairs), "label_pairs_removed_as_near_held_out": near}


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _write(folder: epath.Path, files: Records, facts: dict) -> dict:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Until all is written anew, the folder is not whole.
        (folder / FACTS).unlink(missing_ok=True)
        written = {}
        for name, records in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_text(path, "".join(lines))
            written[name] = {"records": len(records), "sha256": file_digest(path, "--to")}
        facts = {**facts, "files": written}
        write_json(folder / FACTS, facts)
    except OSError as error:
        raise UserError(f"--to {folder} cannot be written ({error}): choose another") from None
    return facts
