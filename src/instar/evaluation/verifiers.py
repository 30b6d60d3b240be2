"""Scorers that check answers to generated problems, see `instar.evaluation.scorers`.

The problems are those of Reasoning Gym (Stojanovski et al. 2025), a function of task, size and
seed, so that a scorer needs no file: it makes them again, and finds each by its question.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from instar.data.completions import Prompt, prompt_messages
from instar.errors import UserError


def reasoning_gym(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    task: str = "chain_sum",
    size: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """What the task's own check gives to each answer: 1 for the right one, less for others.

    Args:
      prompts: whose last message is a question of the task, as `write_prompts` writes it.
      task, size, seed: those that the prompts were written with.

    Returns:
      float64 [N], each in [0, 1].

    Raises:
      UserError: the package reasoning-gym is missing, there is no such task, or a prompt is none
        of its questions.
    """
    dataset, entries = _problems(task, size, seed)
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        question = prompt_messages(prompt)[-1]["content"]
        if question not in entries:
            raise UserError(
                f"the prompt {question[:60]!r} is none of the {size} questions of {task} with seed "
                f"{seed}: give the scorer the task, size and seed that the prompts were made with"
            )
        scores.append(dataset.score_answer(completion.strip(), entries[question]))
    return np.asarray(scores, np.float64)


def write_prompts(
    path: epath.PathLike, task: str = "chain_sum", size: int = 1000, seed: int = 0
) -> None:
    """Writes the questions of a task as JSON lines {"prompt": question}, each once.

    Raises:
      UserError: see `reasoning_gym`; or the file exists.
    """
    file = epath.Path(path)
    if file.exists():
        raise UserError(f"{file} exists: remove it, or write elsewhere")
    lines = [json.dumps({"prompt": question}) for question in _problems(task, size, seed)[1]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


@functools.lru_cache(maxsize=8)
def _problems(task: str, size: int, seed: int) -> tuple[Any, dict[str, dict]]:
    """The task's data set, and its entries by their questions."""
    try:
        import reasoning_gym as library
    except ImportError:
        raise UserError(
            'the verifier needs reasoning-gym: install Instar with the extra "verifiers"'
        ) from None
    try:
        dataset = library.create_dataset(task, size=size, seed=seed)
    except Exception as error:  # whatever the library raises of names and sizes
        raise UserError(f"reasoning-gym makes no {size} problems of {task!r}: {error}") from error
    return dataset, {entry["question"]: entry for entry in dataset}
