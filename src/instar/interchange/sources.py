"""Models that others made: a Hugging Face folder or a GGUF file, opened but not yet read."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.data.gguf_tokenizer import tokenizer_from_gguf
from instar.data.tokenizer import Tokenizer, load_tokenizer
from instar.errors import UserError
from instar.families.family import Family
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout
from instar.families.registry import FAMILIES
from instar.interchange import gguf_file, safetensors
from instar.interchange.card import ModelCard
from instar.interchange.parameters import ForeignParameter, match
from instar.interchange.score_head import is_scorer, read_head, with_score
from instar.interchange.tensors import StoredTensors
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What `instar prepare` writes last.
MANIFEST = "manifest.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

REMEDY = "name a run's folder, a checkpoint, a Hugging Face folder or a GGUF file"

# Of a large file, what `digest_of_files` reads: so many pieces of so many bytes.
PIECES, PIECE_BYTES = 64, 2**16


@dataclass(frozen=True)
class ForeignModel:
    """A model in another program's format: what it is, and where its tensors lie."""

    card: ModelCard
    layout: Layout
    stored: StoredTensors
    source: Path

    def parameters(self, model: LanguageModel | RewardModel) -> dict[str, ForeignParameter]:
        """Where each parameter of `model` lies, by dotted path; a reward model is one network.

        Raises:
          UserError: a tensor is missing, has another shape, or is one too many.
        """
        if isinstance(model, LanguageModel):
            return match(self.layout, model, self.stored, self.source)
        found = match(self.layout, model.model, self.stored, self.source)
        return {f"{model.names[0]}.{path}": each for path, each in found.items()}


def open_foreign(path: Path) -> ForeignModel:
    """Opens a Hugging Face folder or a GGUF file.

    Raises:
      UserError: it is neither, is damaged, or holds a model that no family reads.
    """
    if not path.exists():
        where = " (models of others are read from a local or mounted disk)"
        raise UserError(f"{path} does not exist{where if ':/' in str(path) else ''}: {REMEDY}")
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any code when it is read: convert it to "
            "safetensors on a machine that may run it (save_pretrained of transformers does), and "
            "give the folder"
        )
    if path.is_dir():
        return _open_hub_folder(path)
    if path.suffix != ".gguf":
        raise UserError(f"{path} is neither a folder nor a .gguf file: {REMEDY}")
    return _open_gguf(path)


def digest_of_files(source: Path) -> str:
    """Tells models of others apart: 64 hexadecimal digits over the files of a folder, or one file.

    SHA-256 over their sizes and over pieces from all over each, which training changes everywhere;
    of a model of 100 GB no more is read than of one of 100 MB. It does not prove a file undamaged.
    """
    digest = hashlib.sha256()
    files = {"": source}
    if source.is_dir():
        files = {p.name: p for p in source.iterdir() if p.suffix in (".json", ".safetensors")}
    for name, file in sorted(files.items()):
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(PIECE_BYTES, size // PIECES)):
                stream.seek(start)
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()


def _open_hub_folder(folder: Path) -> ForeignModel:
    fields = _read_json(folder / CONFIG)
    if fields is None:
        raise UserError(f"{folder} holds no model: it has no {CONFIG}; {REMEDY}")
    if fields.get("model_type") is None:
        if (folder / MANIFEST).exists():
            raise UserError(f"{folder} is a prepared data set, not a model: {REMEDY}")
        raise UserError(f"{folder} holds no model: its {CONFIG} has no model_type; {REMEDY}")
    family = _family_of(fields, folder / CONFIG)
    _refuse_quantised(fields, folder / CONFIG)
    spec = family.hub.read_config(HubConfig(fields, str(folder / CONFIG)))
    try:
        spec.check()
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    stop_ids = tuple(_stop_ids(folder, fields, tokenizer))
    # A text with a prefix has its start token behind that.
    begins = tokenizer is not None and tokenizer.adds_bos and spec.prefix is None
    card = ModelCard(spec, tokenizer, _chat_template(folder), stop_ids, begins)
    layout, stored = family.hub.layout, safetensors.open_folder(folder)
    if is_scorer(fields):
        stored = read_head(fields, family.hub, stored, folder / CONFIG)
        card = dataclasses.replace(card, spec=spec.replace(output="scalar"), members=1)
        layout = with_score(layout)
    return ForeignModel(card, layout, stored, folder)


def _family_of(fields: Mapping[str, Any], source: Path) -> Family:
    kind = fields.get("model_type")
    forms = [family for family in FAMILIES.values() if family.hub]
    found = [f for f in forms if isinstance(kind, str) and kind in f.hub.model_types]
    for family in sorted(found, key=lambda family: family.hub.marked_by is None):
        if family.hub.marked_by in (None, *fields):
            return family
    known = sorted({name for family in forms for name in family.hub.model_types})
    raise UserError(
        f"{source}: model_type {kind!r} is none of those that can be read: {', '.join(known)}"
    )


def _refuse_quantised(fields: Mapping[str, Any], source: Path) -> None:
    found = fields.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    raise UserError(
        f"{source}: quantization_config says that the weights are quantised ({method}), which is "
        "not read: convert them to bfloat16 first, without that field (DeepSeek's fp8_cast_bf16.py "
        "does that for fp8)"
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None where there is no such file."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a mapping, not {type(value).__name__}")
    return value


def _chat_template(folder: Path) -> str | None:
    """The template in its own file, or in the config of the tokenizer."""
    path = folder / CHAT_TEMPLATE
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason})") from None
    template = (_read_json(folder / TOKENIZER_CONFIG) or {}).get("chat_template")
    if isinstance(template, list):  # several, by name
        known = (each for each in template if isinstance(each, dict))
        template = {each.get("name"): each.get("template") for each in known}.get("default")
    return template if isinstance(template, str) else None


def _stop_ids(
    folder: Path, fields: Mapping[str, Any], tokenizer: Tokenizer | None
) -> Iterator[int]:
    """The end tokens of the generation config, else of the config, else of the tokenizer."""
    generation = _read_json(folder / GENERATION_CONFIG) or {}
    found = generation.get("eos_token_id", fields.get("eos_token_id"))
    if found is None and tokenizer is not None:
        found = tokenizer.eos_id
    for each in found if isinstance(found, list) else [found]:
        if isinstance(each, int) and not isinstance(each, bool):
            yield each


def _open_gguf(path: Path) -> ForeignModel:
    metadata, stored = gguf_file.open_gguf(path)
    family = gguf_file.family_of(metadata, path)
    spec = family.hub.read_config(gguf_file.config_of(family, metadata, stored, path))
    spec.check()
    tokenizer = tokenizer_from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None
    template = metadata.get("tokenizer.chat_template")
    stop_ids = () if tokenizer is None else (tokenizer.eos_id,)
    begins = metadata.get(
        "tokenizer.ggml.add_bos_token", tokenizer is not None and tokenizer.adds_bos
    )
    card = ModelCard(spec, tokenizer, template, stop_ids, begins)
    return ForeignModel(card, family.gguf.layout, stored, path)
