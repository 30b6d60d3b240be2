"""What the stages are told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from instar.data.loader import LoaderConfig
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.models.transformer import Remat
from instar.sharding.attention import AttentionName
from instar.sharding.mesh import MeshConfig
from instar.stages.presets import with_preset
from instar.training.balance import RouterConfig
from instar.training.batch import BatchConfig
from instar.training.checkpoint import CheckpointConfig
from instar.training.failure import FailureConfig
from instar.training.metrics import LoggingConfig
from instar.training.optimizer import OptimizerConfig, ScheduleConfig, make_schedule


@dataclass(frozen=True)
class DataConfig:
    """A prepared data set, the length of its rows, and the weight of each of its sources.

    Without `weights` each source counts by its tokens.
    """

    path: str
    sequence_length: int
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ExecutionConfig:
    """How the step is computed; see `instar.models.transformer.Execution`.

    `attention` is the way of computing it: `auto` takes what the devices have for each layer,
    `xla` is the reference; `cudnn` and `splash` are the kernels of NVIDIA's GPUs and of TPUs, which
    refuse what they cannot compute. Rows that `mesh.context` splits go round a ring.
    """

    remat: Remat = "none"
    unroll: int = 1
    attention: AttentionName = "auto"


@dataclass(frozen=True)
class LanguageExecutionConfig(ExecutionConfig):
    """How the step of a stage that predicts tokens is computed.

    `loss_chunk` is how many positions of each row the head of a vocabulary reads at a time (0:
    all), in the loss and in held-out evaluation; under PPO, of each response as policy, reference
    and base read it, and of the pretraining text. It divides the length of what it reads.
    """

    loss_chunk: int = 0

    def check(self) -> None:
        if self.loss_chunk < 0:
            raise UserError(f"execution.loss_chunk must be 0 or more, not {self.loss_chunk}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and sample continuations, every `every` steps and at the end.

    `rows` bounds the held-out rows that are read (None: all of them). They are of the sources that
    training reads, each as often as it has rows, whatever its weight; of `sft` they are of the
    dialogues alone, where it reads any, and not of the plain text beside them.
    """

    every: int = 1000
    rows: int | None = None
    batch: int | None = None
    prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check(self) -> None:
        if self.every < 1:
            raise UserError(f"evaluation.every must be at least 1, not {self.every}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every stage that learns from batches is told.

    `hardware` is the name of a preset, such as "h100-8" or "v5p-64" (see
    `instar.stages.presets`): what it says of mesh, rematerialisation, microbatch and dtype holds
    where the config says nothing, and the command sets its flags of XLA.
    """

    batch: BatchConfig
    steps: int
    hardware: str | None = None
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @classmethod
    def complete(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with those of the hardware's preset beneath them."""
        return with_preset(values)

    def check(self) -> None:
        if self.steps is not None:
            if self.steps < 1:
                raise UserError(f"steps must be at least 1, not {self.steps}")
            make_schedule(self.schedule, self.steps, self.batch)
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """What every stage that predicts tokens is told.

    `dropout` is on the residual branches and on the embeddings; `embedding_dropout` is what the
    latter have instead, where it is not None. `z_loss` weights the squared log normaliser (PaLM,
    Chowdhery et al. 2022, section 5), `max_z_loss` the squared largest logit (Baichuan 2,
    2309.10305, section 2.4).
    """

    data: DataConfig
    embedding_dropout: float | None = None
    z_loss: float = 0.0
    max_z_loss: float = 0.0
    router: RouterConfig = field(default_factory=RouterConfig)
    execution: LanguageExecutionConfig = field(default_factory=LanguageExecutionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def check(self) -> None:
        super().check()
        length = self.data.sequence_length
        if length < 1:
            raise UserError(f"data.sequence_length must be at least 1, not {length}")
        chunk = self.execution.loss_chunk
        if chunk and length % chunk:
            raise UserError(
                f"execution.loss_chunk ({chunk}) must divide data.sequence_length ({length})"
            )
        for name in ("z_loss", "max_z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative ({getattr(self, name)})")
        if self.embedding_dropout is not None and not 0 <= self.embedding_dropout < 1:
            raise UserError(f"embedding_dropout must be in [0, 1), not {self.embedding_dropout}")
