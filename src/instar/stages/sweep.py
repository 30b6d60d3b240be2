"""`instar sweep`: a config trained once for each trial, and a table of what they come to.

A trial is a process of its own (`instar.children`), told what one would type, in the folder of its
name. `trials.json` says what is done, and is not done again; `instar.sweep` makes the trials.
"""

import contextlib
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import IO, Literal

from etils import epath
from rich.console import Console

from instar.arguments import nearest
from instar.children import Children
from instar.config import split_argument
from instar.errors import RunError, UserError
from instar.evaluation.report import write_report
from instar.evaluation.sweep_report import text_table
from instar.evaluation.sweep_results import (
    RECORD,
    Goal,
    SweepResults,
    collect,
    finished,
    write_results,
)
from instar.sharding.places import find_place
from instar.stages.steps import RECORD_SECONDS, Records, duration
from instar.stages.sweep_emit import Cluster, emit
from instar.stages.sweep_trials import (
    Trial,
    check_records,
    command_of,
    plan_trials,
    read_trials,
)

# What a trial wrote to its standard output and error, in its folder.
OUTPUT = "output.txt"


@dataclass(frozen=True)
class SweepOptions:
    """Trains a config once for each trial of a sweep, then prints a table, best trial first.

    `config` is a config file and `sweep` a Python file with get_sweep(), which gives what each
    trial changes of it (see the module instar.sweep); --config.FIELD=VALUE changes it in all of
    them. `command` is what a trial runs; without it, that of the config's folder, as pretrain of
    configs/pretrain/x.py. `parallel` trials run at a time: they share the machine, and on GPUs each
    needs its share of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION). Trials are sorted by the last
    value of `metric`, towards `goal`; without them by what suits the command, such as eval/loss.

    Called again, it goes on: what is done is not done again, what was stopped or has failed is
    taken up, and trials that are new in the sweep are added. A trial that is gone or has another
    config is refused.

    `emit` runs nothing, and writes jobs for a cluster into the workdir: a SLURM array or, with
    `image`, a JobSet for each trial, on `nodes` nodes with `gpus` GPUs each, in `partition`,
    `parallel` at a time where that is given. `instar report --workdir=DIR` then makes the
    table.
    """

    config: str
    sweep: str
    workdir: str
    command: str | None = None
    parallel: int | None = None
    metric: str | None = None
    goal: Goal | None = None
    emit: Literal["slurm", "jobset"] | None = None
    image: str | None = None
    partition: str | None = None
    nodes: int = 1
    gpus: int | None = None
    overrides: tuple[tuple[str, str], ...] = field(default=(), metadata={"overrides": True})

    def check(self) -> None:
        for name in ("parallel", "nodes", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.emit == "jobset" and self.image is None:
            raise UserError("--image is missing: a JobSet needs a container in which instar is")
        if self.emit is None and self.nodes > 1:
            raise UserError("nodes: a sweep runs on this machine; --emit writes jobs for more")


def sweep(options: SweepOptions) -> None:
    """Runs the trials that are not done yet, or writes jobs that do, and says what there is.

    Raises:
      UserError: the config or a trial of it is not valid (before the first one runs), or the
        workdir has another sweep.
      RunError: some trials are not done; the others are.
      SystemExit: it was stopped by a signal; with 128 and its number.
    """
    place = find_place()
    if place is not None:
        raise UserError(
            f"instar sweep is one process, and there are {place.count} ({place.source}): with "
            "--emit each trial is a job of several processes"
        )
    folder = epath.Path(options.workdir)
    trials = _plan(options)
    records = Records(folder / RECORD)
    _claim(folder)
    check_records(trials, records)
    known = records.read()
    records.note({trial.step.name: _entry(trial, known) for trial in trials})
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if options.emit is not None:
        cluster = Cluster(
            options.image, options.partition, options.nodes, options.gpus, options.parallel
        )
        name = pathlib.Path(split_argument(options.sweep)[0]).stem
        written = emit(options.emit, trials, name, folder, cluster)
        write_results(folder, collect(folder, options.metric, options.goal))
        console.print(f"{len(trials)} trials: {written}", markup=False)
        return
    children = Children()
    with children.handing_on():
        _run_all(trials, options, records, children, console)
    results = _conclude(folder, options, console)
    if children.signal is not None:
        raise SystemExit(128 + children.signal)
    missing = sum(trial.status != "done" for trial in results.trials)
    if missing:
        raise RunError(
            f"{missing} of {len(trials)} trials failed or were stopped (what they said is in "
            f"{folder}/TRIAL/{OUTPUT}); the same command tries them again"
        )


def _plan(options: SweepOptions) -> list[Trial]:
    command = command_of(options.config, options.command)
    trials = read_trials(options.sweep)
    return plan_trials(trials, command, options.config, options.workdir, options.overrides)


def _claim(folder: epath.Path) -> None:
    """Raises UserError where a folder is that of something else."""
    others = [name for name in ("config.json", "pipeline.json") if (folder / name).exists()]
    if others:
        raise UserError(
            f"workdir {folder} holds something else ({others[0]}): choose a new --workdir"
        )


def _entry(trial: Trial, known: dict) -> dict:
    """What is noted of a trial before it begins."""
    step, before = trial.step, known.get(trial.step.name, {})
    return {
        "command": step.command,
        "overrides": trial.overrides,
        "told": step.told,
        "status": before.get("status", "waiting"),
    }


# --- Running trials -----------------------------------------------------------------------------


def _run_all(
    trials: Sequence[Trial],
    options: SweepOptions,
    records: Records,
    children: Children,
    console: Console,
) -> None:
    """Runs what is not done, in order, as many trials at a time as the options say."""
    waiting = []
    for number, trial in enumerate(trials, start=1):
        name = f"[{number}/{len(trials)}] {trial.step.name}"
        if records.done(trial.step) or finished(epath.Path(trial.step.folder)):
            records.note({trial.step.name: {"status": "done"}})
            console.print(f"{name}: done before", markup=False)
        else:
            waiting.append((name, trial))
    with ThreadPoolExecutor(options.parallel or 1) as pool:
        under_way = [
            pool.submit(_run, name, trial, records, children, console) for name, trial in waiting
        ]
        try:
            for future in as_completed(under_way):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(name: str, trial: Trial, records: Records, children: Children, console: Console) -> None:
    """Runs a trial to its end and notes how it went."""
    step = trial.step
    if children.signal is not None:
        return
    console.print(f"{name}: instar {shlex.join(step.words)}", markup=False)
    running = records.start(step)
    if _is_unchanged(trial):
        with _output(epath.Path(step.folder)) as output:
            code = children.run(step.words, running.tick, RECORD_SECONDS, output)
        reason = f"exit code {code}{_last_line(epath.Path(step.folder) / OUTPUT)}"
    else:
        code, reason = 2, "the config file has changed since the sweep was started"
    running.end(code, reason=reason if code else "")
    took = duration(records.seconds(step.name))
    ended = f"ended after {took}: {reason}" if code else f"done in {took}"
    console.print(f"{name}: {ended}", markup=False)


def _is_unchanged(trial: Trial) -> bool:
    """Whether the config file still says what the trial was planned with."""
    try:
        return trial.again().told == trial.step.told
    except UserError:
        return False


@contextlib.contextmanager
def _output(folder: epath.Path) -> Iterator[IO[bytes] | None]:
    """Where a trial's words go: a file of its folder, behind those of earlier starts.

    None where files cannot be appended to, on object stores.
    """
    if "://" in str(folder):
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / OUTPUT, "ab") as file:
        yield file


def _last_line(path: epath.Path) -> str:
    if not path.exists():
        return ""
    text = path.read_bytes().decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return f": {lines[-1].strip()}" if lines else ""


# --- The end ------------------------------------------------------------------------------------


def _conclude(folder: epath.Path, options: SweepOptions, console: Console) -> SweepResults:
    """Prints the table, and writes it and the report."""
    results = collect(folder, options.metric, options.goal)
    write_results(folder, results)
    print(text_table(results), flush=True)
    _warn_of(results, console)
    console.print(f"report: {write_report(folder)}", markup=False)
    return results


def _warn_of(results: SweepResults, console: Console) -> None:
    """Says so where no trial has the metric."""
    if results.metric is not None and results.metric not in results.logged and results.logged:
        hint = nearest(results.metric, results.logged, "the metrics")
        console.print(f"no trial has logged {results.metric!r}; {hint}", markup=False)
