"""The engine that everything which generates text shares: chat, evaluation and rollouts."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from instar.errors import UserError
from instar.generation import programs
from instar.generation.programs import NOTHING, Rows, State
from instar.generation.requests import Completion, Decode, Progress, Request
from instar.generation.sampling import Mode, RowSettings, SamplingConfig
from instar.models.language_model import LanguageModel, Params
from instar.models.spec import ModelSpec
from instar.sharding.inputs import fetch
from instar.sharding.rules import batch_shards

PIECE = 512  # prompts are read at most so many tokens at a time
LEAST_PIECE = 16
LEAST_CAPACITY = 64
LEAST_STOP_IDS = 4

# New tokens between two looks at them: at each where somebody waits for it, at a few where a stop
# string may have come, and otherwise seldom, since the device ends by itself.
STEPS_STREAMED, STEPS_READ, STEPS_ALONE = 1, 8, 64


@dataclass(frozen=True)
class Update:
    """New tokens of one request, by its place among those given, and what it came to if it ended.

    The tokens of all updates of a request are those of its completion.
    """

    index: int
    tokens: list[int]
    completion: Completion | None


class Engine:
    """Continues prompts with a model, many at a time.

    Programs are compiled for buckets of shapes and for nothing else: rows are a power of two (times
    the parts into which a mesh splits a batch); prompts are read in pieces of a power of two from
    16 to 512 tokens; the cache holds a power of two of tokens from 64 on, or all the positions of
    the model, and of a layer with a window no more than that. Rows that fill a bucket up are dead
    from the start. Settings, seeds, stop ids and lengths are arrays.
    """

    def __init__(
        self,
        model: LanguageModel,
        decode: Decode | None = None,
        *,
        mesh: Mesh | None = None,
        max_rows: int = 64,
    ):
        """An engine for any parameters of `model`.

        Args:
          decode: token ids -> text, for completions' `text` and for stop strings.
          mesh: that of the model's execution and of the parameters, if there is one.
          max_rows: requests beyond so many wait for the first to end.
        """
        self._spec = model.spec
        self._decode = decode
        self._row_multiple = 1 if mesh is None else batch_shards(mesh)
        self._max_rows = max_rows
        self._start = jax.jit(functools.partial(programs.start, model), static_argnums=3)
        self._prefill = jax.jit(functools.partial(programs.prefill, model), donate_argnums=1)
        self._generate = jax.jit(
            functools.partial(programs.generate, model),
            static_argnames=("steps", "mode"),
            donate_argnums=1,
        )

    def check(self, requests: Sequence[Request], name: str = "prompt") -> None:
        """Raises UserError where a request cannot be met; compiles and runs nothing.

        `name` is what the sentence calls a prompt, before its number.
        """
        for index, request in enumerate(requests):
            request.check(self._spec, f"{name} {index}")
            if request.stop_strings and self._decode is None:
                raise UserError("stop_strings need an engine that was given `decode`")

    def generate(self, params: Params, requests: Sequence[Request]) -> list[Completion]:
        """The completion of each request, in their order.

        Raises:
          UserError: a request cannot be met; see `check`.
        """
        reads = any(request.stop_strings for request in requests)
        completions: dict[int, Completion] = {}
        for update in self._updates(params, requests, STEPS_READ if reads else STEPS_ALONE):
            if update.completion is not None:
                completions[update.index] = update.completion
        return [completions[index] for index in range(len(requests))]

    def stream(self, params: Params, requests: Sequence[Request]) -> Iterator[Update]:
        """New tokens as they come. Raises UserError, at once, as `generate` does."""
        self.check(requests)
        return self._updates(params, requests, STEPS_STREAMED)

    def _updates(self, params: Params, requests: Sequence[Request], steps: int) -> Iterator[Update]:
        self.check(requests)
        for first in range(0, len(requests), self._max_rows):
            batch = requests[first : first + self._max_rows]
            for index, tokens, completion in self._run(params, batch, steps):
                yield Update(first + index, tokens, completion)

    def _run(
        self, params: Params, requests: Sequence[Request], steps: int
    ) -> Iterator[tuple[int, list[int], Completion | None]]:
        mode = Mode.of([request.sampling for request in requests])
        count = self._row_multiple * bucket(-(-len(requests) // self._row_multiple))
        rows = make_rows(requests, count, self._spec)
        state = self._read_prompts(params, requests, count, mode)
        limits = [request.limit(self._spec) for request in requests]
        progress = [Progress(*each, self._decode) for each in zip(requests, limits, strict=True)]
        while any(p.completion is None for p in progress):
            wanted = np.zeros(count, bool)
            wanted[: len(progress)] = [p.completion is None for p in progress]
            state, *new = self._generate(params, state, rows, wanted, steps=steps, mode=mode)
            tokens, log_probs = fetch(new)
            for index in np.flatnonzero(wanted):
                length = int((tokens[index] != NOTHING).sum())
                found = tokens[index, :length].tolist(), log_probs[index, :length].tolist()
                added = progress[index].extend(*found)
                yield int(index), added, progress[index].completion

    def _read_prompts(
        self, params: Params, requests: Sequence[Request], count: int, mode: Mode
    ) -> State:
        """The state of `count` rows whose prompts are read, all but their last tokens."""
        prompts = [list(request.prompt) for request in requests]
        longest = max(len(r.prompt) + r.limit(self._spec) for r in requests)
        capacity = min(bucket(longest, LEAST_CAPACITY), self._spec.max_positions)
        last, alive = np.zeros(count, np.int32), np.zeros(count, bool)
        last[: len(prompts)], alive[: len(prompts)] = [p[-1] for p in prompts], True
        seen = np.zeros((count, self._spec.vocab_size), bool) if mode.penalizes else None
        if seen is not None:
            for row, prompt in zip(seen, prompts, strict=False):
                row[prompt] = True
        state = self._start(last, alive, seen, capacity)
        # All of a prefix sees all of it, and is read at once.
        most = PIECE if self._spec.prefix is None else bucket(self._spec.max_positions)
        for tokens, lengths in pieces([prompt[:-1] for prompt in prompts], count, most):
            state = self._prefill(params, state, tokens, lengths)
        return state


def bucket(size: int, least: int = 1) -> int:
    """The least power of two that is neither below `size` nor below `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def pieces(
    prompts: Sequence[Sequence[int]], count: int, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prompts in pieces: tokens int32 [count, S], right-padded with 0, and lengths int32 [count].

    S is at most `most`. Rows beyond the prompts have length 0, and so has a prompt that ended in an
    earlier piece.
    """
    longest = max(map(len, prompts))
    width = min(bucket(longest, LEAST_PIECE), most)
    for begin in range(0, longest, width):
        tokens, lengths = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[begin : begin + width]
            tokens[row, : len(piece)], lengths[row] = piece, len(piece)
        yield tokens, lengths


def make_rows(requests: Sequence[Request], count: int, spec: ModelSpec) -> Rows:
    """What the programs are told of each request, in `count` rows."""
    filling = [Request([0], SamplingConfig(temperature=0.0))] * (count - len(requests))
    rows = [*requests, *filling]
    width = bucket(max(len(row.stop_ids) for row in rows), LEAST_STOP_IDS)
    stop_ids = np.full((count, width), NOTHING, np.int32)
    for ids, row in zip(stop_ids, rows, strict=True):
        ids[: len(row.stop_ids)] = row.stop_ids
    return Rows(
        settings=RowSettings.of([row.sampling for row in rows], [row.seed for row in rows]),
        limit=np.asarray([row.limit(spec) for row in rows], np.int32),
        stop_ids=stop_ids,
    )
