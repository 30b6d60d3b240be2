"""What the reward stage is told."""

from dataclasses import dataclass, field
from typing import Literal

from instar.data.preferences import PreferenceConfig
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.stages.config import RunConfig


@dataclass(frozen=True)
class NormaliseConfig:
    """What scores are measured from, once training is done; it becomes part of each member's head.

    Attributes:
      kind: `demonstrations` moves the scores so that those of people's completions have mean 0
        (InstructGPT, Ouyang et al. 2022, section 3.4); `samples` also scales them, so that those of
        a policy's samples have mean 0 and standard deviation 1 (Ziegler et al. 2019, section 2.1).
      path: JSON lines. Demonstrations: lines with "prompt" and "completion", or dialogues with
        "messages" that end with the assistant's. Samples: lines with "prompt".
      policy: the language model that is sampled; None: the parent.
      sampling: how it is sampled.
      count: at most so many are scored, spread over the file.
    """

    kind: Literal["none", "demonstrations", "samples"] = "none"
    path: str | None = None
    policy: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    count: int = 512

    def check(self) -> None:
        if (self.kind == "none") != (self.path is None):
            raise UserError(
                f"normalise.path ({self.path}) goes with normalise.kind demonstrations or samples, "
                f"not with {self.kind}"
            )
        if self.policy is not None and self.kind != "samples":
            raise UserError(f"normalise.policy goes with normalise.kind samples, not {self.kind}")
        if self.count < 2:
            raise UserError(f"normalise.count must be at least 2, not {self.count}")


@dataclass(frozen=True)
class RewardEvaluationConfig:
    """On which texts the model is judged, every `every` steps and at the end.

    Attributes:
      sets: files of rankings, pairs or ratings (see `instar.data.preferences.PreferenceConfig`) by
        name. Compared are the texts of a ranking or a pair, and ratings as `data.group` says.
      limit: about so many texts of each set at most, spread over it, are read on the way, and
        `texts` at the end.
      baseline: a file of ratings that a linear model on words learns from, to compare with, and
        perhaps a second one, of another scale, that helps it.
      max_length: longer texts are left out; None: data.max_length.
    """

    every: int = 1000
    sets: dict[str, str] = field(default_factory=dict)
    limit: int = 512
    texts: int = 3000
    baseline: tuple[str, ...] = ()
    max_length: int | None = None

    def check(self) -> None:
        for name in ("every", "limit", "texts"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluation.{name} must be at least 1, not {getattr(self, name)}")
        if len(self.baseline) > 2:
            raise UserError(f"evaluation.baseline takes one or two files, not {len(self.baseline)}")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """Everything that `instar reward` is told.

    Attributes:
      parent: a language model, of which every member takes the body, or a reward model, which is
        trained on with its heads: a run's folder, a checkpoint, a Hugging Face folder, a GGUF file.
      data: what is compared. `batch` is in prompts, each with all its completions.
      steps: None: as many as make `epochs` of the data.
      members: how many networks; None: as many as a reward model that is the parent has, else 1. Of
        a parent of one network each takes a copy; of several there must be as many.
      margin: by how much the better completion's score should be higher (Touvron et al. 2023).
      gap_margin: by how much more for each unit between the ratings, or ranks, of a pair, so that
        scores learn how much better it is.
      gap_noise: how far apart ratings, or ranks, must be to be believed: a pair g apart is taken to
        be the wrong way round with probability sigmoid(-g / gap_noise); 0: all are believed.
      centring: the weight of what pulls scores towards 0 (Eisenstein et al. 2023, equation 2).
      chat_template: a template's name, for a parent that has none of its own.
    """

    parent: str
    data: PreferenceConfig
    steps: int | None = None
    epochs: float = 1.0
    members: int | None = None
    margin: float = 0.0
    gap_margin: float = 0.0
    gap_noise: float = 0.0
    centring: float = 0.0
    chat_template: str | None = None
    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    evaluation: RewardEvaluationConfig = field(default_factory=RewardEvaluationConfig)

    def check(self) -> None:
        super().check()
        if not self.epochs > 0:
            raise UserError(f"epochs must be positive, not {self.epochs}")
        if self.members is not None and self.members < 1:
            raise UserError(f"members must be at least 1, not {self.members}")
        for name in ("margin", "gap_margin", "gap_noise", "centring"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative ({getattr(self, name)})")
