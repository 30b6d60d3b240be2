"""The table of commands: where each one's function lies, named and not imported.

The command line runs them, and a pipeline runs them one after the other.
"""

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command's function is, and the schema of what it is told, as ``module:name``.

    With the schema of a config the function is called with (config, workdir), with that of options
    with (options). `together` says that several processes take it as one program.
    """

    summary: str
    function: str
    config: str | None = None
    options: str | None = None
    together: bool = False


COMMANDS = {
    "prepare": Command(
        "turns text into a data set of token shards",
        function="instar.data.prepare:prepare",
        config="instar.data.prepare:PrepareConfig",
    ),
    "demonstration": Command(
        "makes the demonstration's files of people's ratings of sentences",
        function="instar.data.demonstration:demonstration",
        options="instar.data.demonstration:DemonstrationOptions",
    ),
    "pretrain": Command(
        "trains a language model on a prepared data set, or goes on with a run that was stopped",
        function="instar.stages.pretrain:pretrain",
        config="instar.stages.pretrain:PretrainConfig",
        together=True,
    ),
    "sft": Command(
        "fine-tunes a model on prepared dialogues",
        function="instar.stages.sft:sft",
        config="instar.stages.sft:SftConfig",
        together=True,
    ),
    "reward": Command(
        "trains a reward model on what people preferred",
        function="instar.stages.reward:reward",
        config="instar.stages.reward_config:RewardConfig",
        together=True,
    ),
    "ppo": Command(
        "improves a model by reinforcement, against a reward model or any function",
        function="instar.stages.ppo:ppo",
        config="instar.stages.ppo_config:PpoConfig",
        together=True,
    ),
    "compare": Command(
        "compares models on the same prompts, by judges and by what they cost",
        function="instar.stages.compare:compare",
        config="instar.stages.compare_config:CompareConfig",
    ),
    "pipeline": Command(
        "runs commands one after the other, each with its own config",
        function="instar.stages.pipeline:pipeline",
        config="instar.stages.pipeline:PipelineConfig",
    ),
    "sweep": Command(
        "trains once for each trial of a sweep and sorts them by what they come to",
        function="instar.stages.sweep:sweep",
        options="instar.stages.sweep:SweepOptions",
    ),
    "report": Command(
        "writes the report of a run, comparison, pipeline or sweep (DIR/report.html) again",
        function="instar.evaluation.report:report",
        options="instar.evaluation.report:ReportOptions",
    ),
    "lineage": Command(
        "prints where a model comes from",
        function="instar.interchange.lineage:lineage",
        options="instar.interchange.lineage:LineageOptions",
    ),
    "import": Command(
        "makes a checkpoint of a Hugging Face folder or a GGUF file",
        function="instar.interchange.convert:import_model",
        options="instar.interchange.convert:ImportOptions",
    ),
    "export": Command(
        "writes a checkpoint as a folder that Hugging Face's transformers loads",
        function="instar.interchange.convert:export_model",
        options="instar.interchange.convert:ExportOptions",
    ),
    "generate": Command(
        "continues prompts and prints JSON lines",
        function="instar.serving.generate:generate",
        options="instar.serving.generate:GenerateOptions",
    ),
    "chat": Command(
        "talks with a model in the terminal",
        function="instar.serving.chat:chat",
        options="instar.serving.chat:ChatOptions",
    ),
}


def resolve(reference: str) -> Any:
    """Imports what ``module:name`` names."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)
