"""Stage 1: next-token prediction on raw text, or on blanks in it for a model with a prefix."""

import dataclasses
import math
from dataclasses import dataclass, field

from etils import epath

from instar.data.dataset import TokenDataset
from instar.errors import UserError
from instar.families.registry import ModelConfig, build_spec
from instar.interchange.card import ModelCard
from instar.models.parameters import Initialization
from instar.models.spec import ModelSpec
from instar.sharding.mesh import make_mesh
from instar.sharding.processes import join_processes
from instar.stages.config import LanguageConfig
from instar.stages.language import Start, make_model, run_stage
from instar.stages.prefix import with_prefix_of
from instar.training.batch import steps_of_rows
from instar.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LanguageConfig):
    """Everything that `instar pretrain` is told.

    `steps` are, where they are None, as many as read `tokens` tokens.
    """

    model: ModelConfig
    steps: int | None = None
    tokens: int | None = None
    initialization: Initialization = field(default_factory=Initialization)

    def with_steps(self) -> "PretrainConfig":
        """The same with its number of steps."""
        if self.steps is not None:
            return self
        rows = math.ceil(self.tokens / self.data.sequence_length)
        return dataclasses.replace(self, steps=steps_of_rows(self.batch, rows))

    def check(self) -> None:
        if self.steps is None and self.tokens is None:
            raise UserError("steps: this field is required, or tokens in its place")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"tokens must be at least 1, not {self.tokens}")
        super().check()
        if self.steps is None:
            self.with_steps().check()
        length, positions = self.data.sequence_length, self.model.max_positions
        if positions is not None and length > positions:
            raise UserError(
                f"data.sequence_length ({length}) exceeds model.max_positions ({positions})"
            )


def pretrain(config: PretrainConfig, workdir: str) -> TrainState:
    """Trains a model on a prepared data set and writes a report; resumes where it was stopped.

    Raises:
      UserError: the data, the mesh, the workdir or the sizes do not fit; nothing is overwritten.
      RunError: the run cannot go on.
    """
    join_processes()
    config = config.with_steps()
    dataset = TokenDataset.open(config.data.path)
    spec = build_spec(
        config.model,
        vocab_size=dataset.tokenizer.vocab_size,
        max_positions=config.data.sequence_length,
    )
    spec = with_prefix_of(spec, dataset)
    mesh = make_mesh(config.mesh)
    model = make_model(config, spec, dataset, mesh)
    card = make_card(spec, dataset)
    start = Start("pretrain", card, config.initialization)
    return run_stage(config, epath.Path(workdir), dataset, model, mesh, start)


def make_card(spec: ModelSpec, dataset: TokenDataset) -> ModelCard:
    """What checkpoints say of the model. Texts with blanks have no BOS, and an end of their own."""
    tokenizer, blanks = dataset.tokenizer, dataset.blanks
    if blanks is None:
        return ModelCard(spec, tokenizer, stop_ids=(tokenizer.eos_id,))
    stop_ids = tuple(sorted({tokenizer.eos_id, blanks.end}))
    return ModelCard(spec, tokenizer, stop_ids=stop_ids, begins_with_bos=False)
