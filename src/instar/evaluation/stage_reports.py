"""Which module reports on the runs of which stage.

Each has the functions `summary`, `figures` and `sections`, for the page of a run; and for the
report of a chain, in which a run is one of many, `key_figures`, `key_sections` and `key_result`.
"""

from types import ModuleType

from instar.evaluation import language_report, ppo_report, reward_report
from instar.evaluation.run_files import Run

_STAGES: dict[str, ModuleType] = {"reward": reward_report, "ppo": ppo_report}


def of(run: Run) -> ModuleType:
    """The module for a run; that for language models where its stage has none of its own."""
    return _STAGES.get(run.stage, language_report)
