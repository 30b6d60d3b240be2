"""Stage 2: supervised fine-tuning on dialogues, of which the assistant's words are the targets."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from etils import epath

from instar.data.chat import ChatTemplate, stop_ids
from instar.data.dataset import TokenDataset
from instar.data.rows import TrainingRows
from instar.errors import UserError
from instar.interchange.loading import Opened, refuse_reward_model
from instar.interchange.parents import pin
from instar.sharding.mesh import make_mesh
from instar.sharding.processes import join_processes
from instar.stages.config import LanguageConfig
from instar.stages.language import Start, make_model, run_stage
from instar.training.batch import steps_of_rows
from instar.training.state import TrainState

# What may be fine-tuned: language models, fine-tuned ones among them.
PARENTS = ("pretrain", "import", "sft")


@dataclass(frozen=True, kw_only=True)
class SftConfig(LanguageConfig):
    """Everything that `instar sft` is told.

    `parent` is what is fine-tuned: a run's folder, a checkpoint, a Hugging Face folder or a GGUF
    file. `data` is prepared with `sources.N.dialogue`; a source of plain text beside the dialogues,
    weighted by `data.weights`, is a pretraining mix (InstructGPT, Ouyang et al. 2022, appendix C).
    `steps` are, where they are None, as many as read the dialogues `epochs` times.
    """

    parent: str
    steps: int | None = None
    epochs: float = 1.0

    def check(self) -> None:
        super().check()
        if not self.epochs > 0:
            raise UserError(f"epochs must be positive, not {self.epochs}")


def sft(config: SftConfig, workdir: str) -> TrainState:
    """Fine-tunes a model on prepared dialogues and writes a report; resumes where it was stopped.

    Raises:
      UserError: the parent or the data do not fit each other, or the mesh, the workdir or the sizes
        do not; nothing is overwritten.
      RunError: the run cannot go on.
    """
    join_processes()
    dataset = TokenDataset.open(config.data.path)
    parent = pin(workdir, "parent", config.parent, needed=False)
    check_parent(config, parent, dataset)
    config = dataclasses.replace(config, steps=count_steps(config, dataset))
    mesh = make_mesh(config.mesh)
    model = make_model(config, parent.card.spec, dataset, mesh)
    tokenizer = dataset.tokenizer
    template = ChatTemplate(f"of {dataset.path}", dataset.chat_template)
    card = dataclasses.replace(
        parent.card, tokenizer=tokenizer, chat_template=template.source
    ).stopping_at(stop_ids(tokenizer, template))
    start = Start(
        "sft",
        card,
        params=lambda: parent.read(model, jnp.dtype(jnp.float32), mesh),
        parent=parent.lineage,
        judged=dataset.dialogues,
        as_prompt=lambda text: [{"role": "user", "content": text}],
    )
    return run_stage(config, epath.Path(workdir), dataset, model, mesh, start)


def count_steps(config: SftConfig, dataset: TokenDataset) -> int:
    """The steps of the config, or as many as read its epochs of the dialogues."""
    if config.steps is not None:
        return config.steps
    length, weights = config.data.sequence_length, config.data.weights
    rows = TrainingRows(dataset, sequence_length=length, weights=weights, seed=config.seed)
    return steps_of_rows(config.batch, rows.rows_of_epochs(config.epochs))


def check_parent(config: SftConfig, parent: Opened, dataset: TokenDataset) -> None:
    """Raises UserError where the parent is of a wrong stage or reads other tokens."""
    if parent.lineage["stage"] not in PARENTS:
        raise UserError(
            f"parent {config.parent} comes from stage {parent.lineage['stage']}, and sft goes on "
            f"from {', '.join(PARENTS)}"
        )
    refuse_reward_model(config.parent, parent.card, "answers no dialogues")
    if dataset.chat_template is None:
        raise UserError(
            f"the data set {dataset.path} holds no dialogues: prepare it with sources.N.dialogue "
            "and chat_template"
        )
    known = parent.card.tokenizer
    if known is not None and known.digest != dataset.tokenizer.digest:
        raise UserError(
            f"the data set {dataset.path} was prepared with the tokenizer "
            f"{dataset.tokenizer.digest[:12]}, and {config.parent} has {known.digest[:12]}: "
            "prepare it with tokenizer.path set to the parent's"
        )
