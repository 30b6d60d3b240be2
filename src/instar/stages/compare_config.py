"""What `instar compare` is told."""

from dataclasses import dataclass, field

from instar.errors import UserError
from instar.evaluation.scorers import ScorerConfig


@dataclass(frozen=True)
class ChecksConfig:
    """What the candidate must be, beside the baseline, to pass.

    Attributes:
      gap: by each judge, its interval must begin more than this above where the baseline's ends.
      kl: the greatest divergence of a response from the reference, in nats.
      distinct_2: the least share of the baseline's distinct-2.
      perplexity: the greatest multiple of the baseline's perplexity under the base.
    """

    gap: float = 0.0
    kl: float = 20.0
    distinct_2: float = 0.7
    perplexity: float = 1.2


@dataclass(frozen=True)
class CompareConfig:
    """Everything that `instar compare` is told.

    Attributes:
      models: paths of language models, by name.
      prompts: JSON lines with "prompt", a text or messages, which no model has learnt from.
      judges: what scores the completions, by name.
      candidate, baseline: the model that is checked, and the one that it is to be better than.
      reference: the model from which the divergence of each is measured.
      base: the model under which the perplexity of the completions is measured.
      count: how many of the prompts are taken, in an order drawn by `seed`.
      max_prompt_length, max_new_tokens: in tokens; longer prompts are left out.
      seed: prompt i is answered with `seed` + i, by each model.
      rows: how many completions are read at a time, where their probabilities are measured.
      samples: how many completions the report shows.
      chat_template: a template's name, where the baseline has none of its own; a model that has
        none is asked in the baseline's.
    """

    models: dict[str, str]
    prompts: str
    judges: dict[str, ScorerConfig]
    candidate: str
    baseline: str
    reference: str
    base: str
    count: int = 256
    max_prompt_length: int = 128
    max_new_tokens: int = 64
    seed: int = 0
    rows: int = 32
    samples: int = 12
    chat_template: str | None = None
    checks: ChecksConfig = field(default_factory=ChecksConfig)

    def check(self) -> None:
        for role in ("candidate", "baseline", "reference", "base"):
            name = getattr(self, role)
            if name not in self.models:
                raise UserError(
                    f"{role} must be the name of one of models ({', '.join(self.models)}), "
                    f"not {name!r}"
                )
        if self.candidate == self.baseline:
            raise UserError(f"candidate and baseline must be two models, not both {self.baseline}")
        if not self.judges:
            raise UserError("judges must name at least one scorer")
        for name in ("count", "max_prompt_length", "max_new_tokens", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.samples < 0 or self.seed < 0:
            raise UserError("samples and seed must not be negative")

    @property
    def names(self) -> list[str]:
        """The models in order: the base, the baseline, others, the candidate."""
        places = {self.base: 0, self.baseline: 1, self.candidate: 3}
        return sorted(self.models, key=lambda name: (places.get(name, 2), name))
