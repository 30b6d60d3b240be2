"""`instar generate`: completions of many prompts, as JSON lines."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from instar.errors import UserError
from instar.generation.requests import Completion
from instar.generation.sampling import SamplingConfig
from instar.interchange.loading import load_language_model
from instar.interchange.model import Model, Prompt


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingConfig):
    """Continues prompts and prints a JSON object for each, in their order.

    `model` is a run's folder, a checkpoint, a Hugging Face folder or a GGUF file. The prompts are
    the arguments; or the lines of `file`, each a text or, in a .jsonl file, a JSON object with
    "prompt" (a text or token ids) or "messages" (a dialogue); or the lines of standard input.
    `chat` makes a text the user's message of a dialogue, with `system` before it; `template` names
    a chat template where the model's own is not wanted. Prompt i is drawn with `seed` + i. `stop`
    may be given several times. `log_probs` adds the new tokens and their log-probabilities.
    """

    model: str
    prompts: tuple[str, ...] = field(default=(), metadata={"positional": True})
    file: str | None = None
    chat: bool = False
    system: str | None = None
    template: str | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    log_probs: bool = False
    batch: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        super().check()
        if self.batch < 1:
            raise UserError(f"batch must be at least 1, not {self.batch}")
        if self.prompts and self.file is not None:
            raise UserError("prompts come from the arguments or from --file, not from both")


def generate(options: GenerateOptions) -> None:
    """Prints a line for each prompt: prompt, completion, number of tokens, and why it ended.

    Raises:
      UserError: the model or the prompts cannot be read; no line is printed for a batch in which
        a prompt is wrong.
    """
    prompts = list(read_prompts(options))
    if not prompts:
        raise UserError("there is no prompt: give one as an argument, by --file, or on stdin")
    model = load_language_model(options.model, dtype=options.dtype)
    settings = SamplingConfig(**{name: getattr(options, name) for name in SETTINGS})
    for first in range(0, len(prompts), options.batch):
        batch = prompts[first : first + options.batch]
        completions = model.generate(
            [as_dialogue(prompt, options) for prompt in batch],
            sampling=settings,
            seed=options.seed + first,
            stop_strings=options.stop,
            template=None if options.template is None else model.chat_template(options.template),
        )
        for prompt, completion in zip(batch, completions, strict=True):
            record = describe(prompt, completion, model, options.log_probs)
            print(json.dumps(record, ensure_ascii=False), flush=True)


SETTINGS = tuple(SamplingConfig.__dataclass_fields__)


def read_prompts(options: GenerateOptions) -> Iterator[Prompt]:
    """The prompts, from where the options say."""
    if options.prompts:
        yield from options.prompts
    elif options.file is None:
        yield from non_empty(sys.stdin)
    else:
        path = Path(options.file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {path} cannot be read ({error})") from None
        if path.suffix != ".jsonl":
            yield from non_empty(lines)
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield read_record(line, f"{path}, line {number}")


def non_empty(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, those with nothing in them left out."""
    stripped = (line.rstrip("\r\n") for line in lines)
    yield from (line for line in stripped if line)


def read_record(line: str, place: str) -> Prompt:
    """The prompt in one line of JSON."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error})") from None
    for name in ("prompt", "messages"):
        if isinstance(record, dict) and isinstance(record.get(name), str | list):
            return record[name]
    raise UserError(f'{place} must be an object with "prompt" or "messages"')


def as_dialogue(prompt: Prompt, options: GenerateOptions) -> Prompt:
    """A text as the user's message, where that is asked for."""
    if not (options.chat and isinstance(prompt, str)):
        return prompt
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": prompt}]


def describe(
    prompt: Prompt, completion: Completion, model: Model, log_probs: bool
) -> dict[str, Any]:
    """The line of one prompt."""
    record = {
        "prompt": prompt,
        "completion": completion.text,
        "tokens": len(completion.tokens),
        "reason": completion.reason,
    }
    if log_probs:
        record["token_ids"] = completion.tokens
        record["log_probs"] = [round(value, 6) for value in completion.log_probs]
    return record
