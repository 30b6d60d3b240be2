"""Stage 1: next-token prediction on raw text."""

from dataclasses import dataclass, field

from etils import epath

from instar.data.dataset import TokenDataset
from instar.errors import UserError
from instar.families.registry import ModelConfig, build_spec
from instar.interchange.card import ModelCard
from instar.models.parameters import Initialization
from instar.sharding.mesh import make_mesh
from instar.sharding.processes import join_processes
from instar.stages.config import LanguageConfig
from instar.stages.language import Start, make_model, run_stage
from instar.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LanguageConfig):
    """Everything that `instar pretrain` is told."""

    model: ModelConfig
    initialization: Initialization = field(default_factory=Initialization)

    def check(self) -> None:
        super().check()
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
    dataset = TokenDataset.open(config.data.path)
    tokenizer = dataset.tokenizer
    spec = build_spec(
        config.model,
        vocab_size=tokenizer.vocab_size,
        max_positions=config.data.sequence_length,
    )
    mesh = make_mesh(config.mesh)
    model = make_model(config, spec, dataset, mesh)
    card = ModelCard(spec, tokenizer, stop_ids=(tokenizer.eos_id,))
    start = Start("pretrain", card, config.initialization)
    return run_stage(config, epath.Path(workdir), dataset, model, mesh, start)
