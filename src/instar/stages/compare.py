"""`instar compare`: models answer the same prompts. Which is better, and what did it cost?"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from instar.data.prompts import PromptSet
from instar.errors import UserError
from instar.evaluation import comparison
from instar.evaluation.compare_report import wins_against_baseline
from instar.evaluation.report import write_report
from instar.evaluation.scorers import open_scorer
from instar.stages.compare_config import ChecksConfig, CompareConfig
from instar.stages.compare_models import (
    Answers,
    Contender,
    TokenLogProbs,
    answer,
    open_contenders,
)
from instar.stages.left_out import tell_left_out
from instar.training.hardware import describe_hardware
from instar.workdir import claim, write_json

RESULTS, SAMPLES = "compare.json", "samples.jsonl"


def compare(config: CompareConfig, workdir: str) -> None:
    """Asks, judges and measures the models; writes compare.json, samples.jsonl and a report.

    Raises:
      UserError: a model, the prompts or a judge cannot be read, or they do not go together.
    """
    folder = epath.Path(workdir)
    contenders = open_contenders(config)
    prompts = choose_prompts(config, contenders)
    judges = {name: open_scorer(each, prompts[0]) for name, each in config.judges.items()}
    claim(folder, config)

    # Each model answers; then two of them read what all have answered.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    read, answers = TokenLogProbs(config.rows), {}
    length = longest_prompt(contenders, prompts)
    for name, contender in contenders.items():
        console.print(f"{name}: answers {len(prompts)} prompts", markup=False)
        answers[name] = answer(contender, prompts, config, read, length)
    by_reference = read_by(contenders[config.reference], answers, config, read, length)
    by_base = read_by(contenders[config.base], answers, config, read, length)

    # What is said of them.
    scores = {
        judge: {
            name: score(prompts, [completion.text for completion in each.completions])
            for name, each in answers.items()
        }
        for judge, score in judges.items()
    }
    found = comparison.compare(
        {name: each.described() for name, each in answers.items()}, scores, config.seed
    )
    for name, each in answers.items():
        found["models"][name] |= {
            "path": contenders[name].path,
            "digest": contenders[name].digest,
            **divergence(each, by_reference[name], config.seed),
            "perplexity": perplexity(each, by_base[name]),
        }
        mark_overlaps(found["models"], name, config.baseline)
    roles = ("candidate", "baseline", "reference", "base", "seed", "max_new_tokens")
    found |= {name: getattr(config, name) for name in roles}
    found |= {
        "samples": config.samples,
        "checks": check(found, config.candidate, config.baseline, config.checks),
        "hardware": describe_hardware(),
        "instar": metadata.version("instar"),
        "time": time.time(),
    }
    write_json(folder / RESULTS, found)
    write_samples(folder / SAMPLES, prompts, answers, scores)
    console.print(table(found))
    for name, verdict in found["checks"].items():
        said = "holds" if verdict["holds"] else "does not hold"
        console.print(f"{name}: {verdict['value']:.3f} (limit {verdict['limit']:g}) {said}")
    console.print(write_report(folder), markup=False)


# --- Prompts and probabilities ------------------------------------------------------------------


def choose_prompts(config: CompareConfig, contenders: Mapping[str, Contender]) -> list:
    """The prompts. Raises UserError where none is short enough, or a model has no room for them."""
    read = PromptSet.open(
        config.prompts, contenders[config.baseline].encoder, config.max_prompt_length
    )
    tell_left_out("prompts", read.facts, read.skipped)
    chosen = read.batch(config.seed, 0, min(config.count, len(read)))
    prompts = [read.prompts[index] for index in chosen]
    needed = longest_prompt(contenders, prompts) + config.max_new_tokens
    for name, contender in contenders.items():
        positions = contender.card.spec.max_positions
        if needed > positions:
            raise UserError(
                f"models.{name} has {positions} positions, and a prompt with its completion may "
                f"take {needed}: lower max_prompt_length or max_new_tokens"
            )
    return prompts


def longest_prompt(contenders: Mapping[str, Contender], prompts: list) -> int:
    """The most tokens that a prompt has for any model."""
    return max(len(each.encoder.prompt(p)) for each in contenders.values() for p in prompts)


def read_by(
    reader: Contender,
    answers: Mapping[str, Answers],
    config: CompareConfig,
    read: TokenLogProbs,
    length: int,
) -> dict[str, list[np.ndarray]]:
    """The log-probabilities of what each model answered, under one of them."""
    model = reader.load()
    return {
        name: read(model, each.prompts, each.responses, length, config.max_new_tokens)
        for name, each in answers.items()
    }


def divergence(answers: Answers, reference: list[np.ndarray], seed: int) -> dict[str, Any]:
    """KL(model || reference) of a response in nats, by the estimators k1 and k3, with intervals."""
    gaps = [own - theirs for own, theirs in zip(answers.log_probs, reference, strict=True)]
    # As `instar.objectives.rewards.kl` has them, in float64.
    sums = {
        "kl": [np.sum(gap) for gap in gaps],
        "kl_k3": [np.sum(np.expm1(-gap) + gap) for gap in gaps],
    }
    return {
        name: asdict(comparison.mean_interval(np.asarray(values), seed))
        for name, values in sums.items()
    }


def perplexity(answers: Answers, base: list[np.ndarray]) -> float:
    """That of the tokens of all completions, but for those that end them."""
    words = [row[: len(row) - end] for row, end in zip(base, answers.ended, strict=True)]
    count = max(sum(map(len, words)), 1)
    return float(np.exp(-sum(row.sum() for row in words) / count))


# --- Verdicts -----------------------------------------------------------------------------------


def mark_overlaps(models: Mapping[str, Any], name: str, baseline: str) -> None:
    """Says of each judge's interval of a model whether it overlaps with the baseline's."""
    if name == baseline:
        return
    for judge, own in models[name]["judges"].items():
        other = models[baseline]["judges"][judge]
        own["overlaps"] = own["low"] <= other["high"] and other["low"] <= own["high"]


def check(
    found: Mapping[str, Any], candidate: str, baseline: str, limits: ChecksConfig
) -> dict[str, dict[str, Any]]:
    """Whether the candidate passes: {"value", "limit", "holds"} of each check.

    `gap/JUDGE` is how far the candidate's interval begins above the end of the baseline's,
    `distinct_2` and `perplexity` are multiples of the baseline's.
    """
    own, other = found["models"][candidate], found["models"][baseline]
    checks = {}
    for judge, interval in own["judges"].items():
        gap = interval["low"] - other["judges"][judge]["high"]
        checks[f"gap/{judge}"] = _verdict(gap, limits.gap, gap > limits.gap)
    divergence, diversity = own["kl"]["value"], own["distinct_2"] / max(other["distinct_2"], 1e-9)
    strangeness = own["perplexity"] / other["perplexity"]
    checks["kl"] = _verdict(divergence, limits.kl, divergence <= limits.kl)
    checks["distinct_2"] = _verdict(diversity, limits.distinct_2, diversity >= limits.distinct_2)
    checks["perplexity"] = _verdict(
        strangeness, limits.perplexity, strangeness <= limits.perplexity
    )
    return checks


def _verdict(value: float, limit: float, holds: bool) -> dict[str, Any]:
    return {"value": value, "limit": limit, "holds": bool(holds)}


# --- What is written ----------------------------------------------------------------------------


def write_samples(
    path: epath.Path,
    prompts: list,
    answers: Mapping[str, Answers],
    scores: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """All completions side by side: JSON lines with `prompt`, `completions` and `scores`."""
    lines = []
    for index, prompt in enumerate(prompts):
        texts = {name: each.completions[index].text for name, each in answers.items()}
        judged = {
            judge: {name: float(values[index]) for name, values in given.items()}
            for judge, given in scores.items()
        }
        record = {"prompt": prompt, "completions": texts, "scores": judged}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    path.write_text("".join(lines))


def table(found: Mapping[str, Any]) -> Table:
    """The figures of all models, for the terminal: a column for each."""
    shown = Table(box=None, header_style="bold")
    for index, title in enumerate(("", *found["models"])):
        shown.add_column(title, justify="right" if index else "left")
    models = list(found["models"].values())

    def interval(each: Mapping[str, float]) -> str:
        return f"{each['value']:.3f} ({each['low']:.3f}, {each['high']:.3f})"

    for judge in models[0]["judges"]:
        shown.add_row(judge, *(interval(each["judges"][judge]) for each in models))
    against = wins_against_baseline(found)
    for judge in models[0]["judges"]:
        wins = {each["model"]: interval(each) for each in against if each["judge"] == judge}
        shown.add_row(f"wins, {judge}", *(wins.get(name, "") for name in found["models"]))
    shown.add_row("KL, nats", *(interval(each["kl"]) for each in models))
    for label, key, form in (
        ("perplexity", "perplexity", "{:.1f}"),
        ("distinct-1", "distinct_1", "{:.3f}"),
        ("distinct-2", "distinct_2", "{:.3f}"),
        ("self-BLEU", "self_bleu", "{:.3f}"),
        ("ended", "ended", "{:.0%}"),
        ("tokens", "length", "{:.1f}"),
    ):
        shown.add_row(label, *(form.format(each[key]) for each in models))
    return shown
