"""What the PPO stage is told."""

from dataclasses import dataclass, field

from instar.errors import UserError
from instar.evaluation.alarms import AlarmConfig
from instar.evaluation.scorers import ScorerConfig
from instar.objectives.rewards import ADAPTIVE_LIMIT
from instar.reinforcement.config import UpdateConfig
from instar.reinforcement.roles import RolesConfig
from instar.schema import located
from instar.stages.config import DataConfig, LanguageExecutionConfig, RunConfig
from instar.training.optimizer import OptimizerConfig, ScheduleConfig, make_schedule


@dataclass(frozen=True)
class PromptsConfig:
    """What the policy answers.

    Attributes:
      path: JSON lines with "prompt", a text or messages.
      held_out: such a file, on `batch.size` prompts of which policy and reference are compared,
        see `PpoEvaluationConfig`; None for none.
      max_length: prompts of more tokens are left out.
    """

    path: str
    held_out: str | None = None
    max_length: int = 128

    def check(self) -> None:
        if self.max_length < 1:
            raise UserError(f"prompts.max_length must be at least 1, not {self.max_length}")


@dataclass(frozen=True)
class ResponseConfig:
    """How the policy answers: all logits, its own and the reference's, are divided by the
    temperature. There is no filter, which would make estimates of the KL wrong."""

    max_new_tokens: int = 64
    temperature: float = 1.0

    def check(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(
                f"response.max_new_tokens must be at least 1, not {self.max_new_tokens}"
            )
        if not self.temperature > 0:
            raise UserError(f"response.temperature must be positive, not {self.temperature}")


@dataclass(frozen=True)
class RewardSourceConfig:
    """Where scores come from: one of the two.

    Attributes:
      model: a reward model that reads the policy's tokens; of several members the mean counts.
      scorer: a Python function of texts, see `instar.evaluation.scorers`.
    """

    model: str | None = None
    scorer: ScorerConfig | None = None

    def check(self) -> None:
        if self.model is None and self.scorer is None:
            raise UserError("reward needs either reward.model or reward.scorer.function")
        if self.model is not None and self.scorer is not None:
            raise UserError(
                "reward has both a model and a scorer: leave one out (--config.reward.scorer=None, "
                "or --config.reward.model=None)"
            )


@dataclass(frozen=True)
class CriticConfig:
    """The critic, a network of its own.

    `parent` is a reward model that it begins as; None: that of the rewards, or where a function
    gives these, the policy's body with a fresh head.
    """

    parent: str | None = None
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=9e-6, weight_decay=0.0)
    )
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(kind="constant"))


@dataclass(frozen=True)
class PtxConfig:
    """Pretraining text whose gradient each update adds (InstructGPT's PPO-ptx).

    `rows` of `data` go with each update; `update.ptx_coefficient` is the weight of their loss.
    """

    data: DataConfig
    rows: int

    def check(self) -> None:
        if self.rows < 1:
            raise UserError(f"ptx.rows must be at least 1, not {self.rows}")


@dataclass(frozen=True)
class PpoEvaluationConfig:
    """Every `every` iterations policy and reference answer held-out prompts.

    They are `batch.size` of them, always the same, drawn by the run's seed; where the file has
    fewer, each is answered several times.
    `samples` of the answers are kept side by side.
    """

    every: int = 20
    samples: int = 8

    def check(self) -> None:
        if self.every < 1 or self.samples < 0:
            raise UserError("evaluation.every must be at least 1 and evaluation.samples 0 or more")


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RunConfig):
    """Everything that `instar ppo` is told; `steps` are iterations.

    Attributes:
      parent: what is trained and, as it was, the reference: a fine-tuned model's run, checkpoint or
        folder.
      batch: responses of an iteration, and how many of them are looked at at once (`microbatch`).
      base: a model whose perplexity of the responses is watched; None: the reference.
      ema: the decay, for each iteration, of a mean of the policy that takes its place in the end.
      gold: measures by name that the policy is not trained on.
      chat_template: a template's name, for a parent that has none of its own.
      optimizer, schedule: the policy's.
    """

    parent: str
    prompts: PromptsConfig
    reward: RewardSourceConfig
    base: str | None = None
    critic: CriticConfig = field(default_factory=CriticConfig)
    response: ResponseConfig = field(default_factory=ResponseConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    ptx: PtxConfig | None = None
    ema: float | None = None
    gold: dict[str, ScorerConfig] = field(default_factory=dict)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    evaluation: PpoEvaluationConfig = field(default_factory=PpoEvaluationConfig)
    execution: LanguageExecutionConfig = field(default_factory=LanguageExecutionConfig)
    chat_template: str | None = None

    def check(self) -> None:
        super().check()
        size, minibatch = self.batch.size, self.update.minibatch
        micro = self.batch.microbatch or minibatch
        if self.batch.ramp is not None:
            raise UserError("batch.ramp: the iterations of PPO are all of one size; leave it out")
        if self.dropout:
            raise UserError(f"dropout ({self.dropout}) must be 0: it makes log-ratios noise")
        if size % minibatch:
            raise UserError(
                f"batch.size ({size}) must be a multiple of update.minibatch ({minibatch})"
            )
        if minibatch % micro:
            raise UserError(
                f"update.minibatch ({minibatch}) must be a multiple of batch.microbatch ({micro})"
            )
        adaptive = self.update.adaptive_kl
        if adaptive is not None and adaptive.horizon <= ADAPTIVE_LIMIT * size:
            raise UserError(
                f"update.adaptive_kl.horizon ({adaptive.horizon:g}) is in responses and must be "
                f"more than {ADAPTIVE_LIMIT:g} * batch.size ({ADAPTIVE_LIMIT * size:g}): one "
                "iteration could make the coefficient negative"
            )
        if self.ptx is not None and self.ptx.rows % (minibatch // micro):
            raise UserError(
                f"ptx.rows ({self.ptx.rows}) must be a multiple of the {minibatch // micro} "
                "microbatches of an update"
            )
        read = {"response.max_new_tokens": self.response.max_new_tokens}
        if self.ptx is not None:
            read["ptx.data.sequence_length"] = self.ptx.data.sequence_length
        chunk = self.execution.loss_chunk
        for name, length in read.items():
            if chunk and length % chunk:
                raise UserError(
                    f"execution.loss_chunk ({chunk}) must divide {name} ({length}); 0 reads all of "
                    "it at once"
                )
        with located("critic.schedule"):
            make_schedule(self.critic.schedule, self.steps, self.batch)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"ema must be in [0, 1), not {self.ema}")

    @property
    def updates(self) -> int:
        """How many updates an iteration makes."""
        return self.update.epochs * (self.batch.size // self.update.minibatch)

    @property
    def microbatch(self) -> int:
        """How many responses are looked at at once."""
        return self.batch.microbatch or self.update.minibatch
