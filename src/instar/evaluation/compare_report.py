"""What the report says of a comparison of models, from `compare.json` and `samples.jsonl`.

They are those that `instar compare` writes: what `instar.evaluation.comparison` finds, and for each
model `kl` and `kl_k3` (intervals) and `perplexity`, and of the whole `candidate`, `baseline`,
`reference`, `base`, `checks`, `hardware`, `instar` and `time`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from markupsafe import Markup

from instar.evaluation.compare_plots import judge_plot, wins_plot
from instar.evaluation.report_page import figures_of, fill
from instar.evaluation.report_words import Fact, date, number, prompt_text, rows
from instar.evaluation.run_facts import hardware_in_words
from instar.evaluation.run_files import SAMPLES, read_optional
from instar.training.logs import read_records

RESULTS = "compare.json"
_CHECKS = {
    "gap": "lower end above the baseline's upper end, by {}",
    "kl": "KL from the reference, nats / response",
    "distinct_2": "distinct-2, share of the baseline's",
    "perplexity": "perplexity by the base, multiple of the baseline's",
}


def load(folder: epath.Path) -> dict[str, Any]:
    """The results of a comparison; {} where the folder has none.

    Raises:
      UserError: the file is damaged.
    """
    return read_optional(folder / RESULTS)


def page(folder: epath.Path, found: Mapping[str, Any]) -> Markup:
    """The page of a comparison as HTML."""
    parts = [date(found["time"])] if "time" in found else []
    parts += hardware_in_words(found.get("hardware", {}))
    parts += [f"instar {found['instar']}"] if "instar" in found else []
    return fill(
        "compare_page.html.jinja",
        name=folder.resolve().name,
        stage="compare",
        subtitle=" · ".join(parts),
        section=section(folder, found),
        hardware=rows(found.get("hardware", {})),
        models=[
            (name, each["path"], each["digest"][:12]) for name, each in found["models"].items()
        ],
    )


def section(folder: epath.Path, found: Mapping[str, Any], prefix: str = "") -> Markup:
    """Checks, figures, table and samples, as they stand in any page."""
    candidate = found["candidate"]
    drawn = [judge_plot(judge, _by_judge(found, judge), candidate) for judge in _judges(found)]
    figures = [(svg, False) for svg in drawn]
    broad = len(drawn) % 2 == 0
    wins = wins_against_baseline(found)
    figures.append((wins_plot(wins, found["baseline"], candidate, broad), broad))
    return fill(
        "compare.html.jinja",
        found=found,
        checks=list(_checks(found)),
        figures=figures_of(figures, prefix),
        head=_head(found),
        models=[_row(name, each) for name, each in found["models"].items()],
        wins=wins,
        names=list(found["models"]),
        samples=list(_samples(folder, found)),
    )


def key_result(found: Mapping[str, Any]) -> str:
    """What the comparison came to, in a few words."""
    checks = found["checks"].values()
    wins = [each for each in wins_against_baseline(found) if each["model"] == found["candidate"]]
    beaten = ", ".join(f"{each['value']:.0%} by {each['judge']}" for each in wins)
    held = f"{sum(each['holds'] for each in checks)} of {len(checks)} checks hold"
    return f"{held}; {found['candidate']} beats {found['baseline']} in {beaten}"


def facts(found: Mapping[str, Any]) -> list[Fact]:
    """What a comparison has to say at the top of a page: of the candidate, beside the baseline."""
    own, other = (found["models"][found[role]] for role in ("candidate", "baseline"))
    shown = []
    for judge, interval in own["judges"].items():
        note = f"{interval['low']:.3f} to {interval['high']:.3f}"
        against = f"{found['baseline']} {other['judges'][judge]['value']:.3f}"
        shown.append(Fact(f"Score by {judge}", f"{interval['value']:.3f}", f"{note}; {against}"))
    for each in wins_against_baseline(found):
        if each["model"] == found["candidate"]:
            note = f"{each['low']:.0%} to {each['high']:.0%}, against {found['baseline']}"
            shown.append(Fact(f"Wins by {each['judge']}", f"{each['value']:.0%}", note))
    shown.append(Fact("KL", number(own["kl"]["value"], ".2f"), f"nats, from {found['reference']}"))
    for key, label, form in (
        ("perplexity", "Perplexity", ".1f"),
        ("distinct_2", "Distinct-2", ".3f"),
    ):
        note = f"{found['baseline']} {number(other[key], form)}"
        shown.append(Fact(label, number(own[key], form), note))
    return shown


def _judges(found: Mapping[str, Any]) -> list[str]:
    return list(found["models"][found["baseline"]]["judges"])


def _by_judge(found: Mapping[str, Any], judge: str) -> dict[str, Mapping[str, float]]:
    return {name: each["judges"][judge] for name, each in found["models"].items()}


def wins_against_baseline(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `wins` against the baseline; of a model that is earlier than it, turned around."""
    shown = []
    for each in found["wins"]:
        if each["against"] == found["baseline"]:
            shown.append(dict(each))
        elif each["model"] == found["baseline"]:
            turned = {"value": 1 - each["value"], "low": 1 - each["high"], "high": 1 - each["low"]}
            shown.append(each | {"model": each["against"], "against": each["model"]} | turned)
    return shown


def _checks(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, verdict in found["checks"].items():
        kind, _, judge = name.partition("/")
        rising = kind in ("gap", "distinct_2")
        yield {
            "words": _CHECKS[kind].format(judge),
            "value": number(verdict["value"], "+.3f" if kind == "gap" else ".3f"),
            "limit": f"{'>' if kind == 'gap' else '≥' if rising else '≤'} {verdict['limit']:g}",
            "holds": verdict["holds"],
        }


def _head(found: Mapping[str, Any]) -> list[str]:
    measures = (
        "KL (nats)",
        "perplexity",
        "distinct-1",
        "distinct-2",
        "self-BLEU",
        "ended",
        "tokens",
    )
    return ["model", *_judges(found), *measures]


def _row(name: str, each: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, its interval in small print) of each column."""
    intervals = [
        (f"{m['value']:.3f}", f"{m['low']:.3f} to {m['high']:.3f}") for m in each["judges"].values()
    ]
    kl = each["kl"]
    return [
        (name, ""),
        *intervals,
        (number(kl["value"], ".2f"), f"{number(kl['low'], '.2f')} to {number(kl['high'], '.2f')}"),
        (number(each["perplexity"], ".1f"), ""),
        *((f"{each[key]:.3f}", "") for key in ("distinct_1", "distinct_2", "self_bleu")),
        (f"{each['ended']:.0%}", ""),
        (f"{each['length']:.1f}", ""),
    ]


def _samples(folder: epath.Path, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for record in read_records(folder / SAMPLES)[: found.get("samples", 0)]:
        yield {
            "prompt": prompt_text(record["prompt"]),
            "texts": [
                (record["completions"].get(name, ""), _remark(record["scores"], name))
                for name in found["models"]
            ],
        }


def _remark(scores: Mapping[str, Mapping[str, float]], name: str) -> str:
    return " · ".join(f"{judge} {given[name]:+.2f}" for judge, given in scores.items())
