"""GGUF, the file format of llama.cpp: metadata, and tensors that may be quantised."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from instar.errors import UserError
from instar.families.family import Family
from instar.families.hub_config import HubConfig
from instar.families.registry import FAMILIES
from instar.interchange.tensors import StoredTensor

Metadata = Mapping[str, Any]


def open_gguf(path: Path) -> tuple[Metadata, dict[str, StoredTensor]]:
    """The metadata, as plain values, and the tensors of a file; reading one dequantises it.

    Raises:
      UserError: the file is truncated, no GGUF file, or quantised in a way that cannot be undone.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is truncated, or no GGUF file ({reason})") from None
    return metadata, {tensor.name: _stored(path, tensor) for tensor in reader.tensors}


def _stored(path: Path, tensor: gguf.ReaderTensor) -> StoredTensor:
    # ggml counts the dimensions from the innermost.
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def read() -> np.ndarray:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{path}: {tensor.name} is quantised as {kind}, which cannot be undone here: "
                "take a file of another quantisation"
            ) from None
        return values.reshape(shape)

    return StoredTensor(shape, read)


def family_of(metadata: Metadata, path: Path) -> Family:
    """The family of a file's architecture.

    Raises:
      UserError: no family has it.
    """
    architecture = metadata.get("general.architecture")
    known = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf}
    if architecture not in known:
        raise UserError(
            f"{path} holds a model of architecture {architecture!r}; those that can be read are "
            f"{', '.join(known)}"
        )
    return known[architecture]


def config_of(
    family: Family, metadata: Metadata, stored: Mapping[str, StoredTensor], path: Path
) -> HubConfig:
    """The metadata as the config.json that the family reads."""
    form = family.gguf
    fields = {
        ours: _decimal(metadata.get(f"{form.architecture}.{theirs}"))
        for ours, theirs in form.fields.items()
    }
    if "token_embd.weight" in stored:  # that it is missing is said with the other tensors
        fields["vocab_size"] = stored["token_embd.weight"].shape[0]
    fields["tie_word_embeddings"] = "output.weight" not in stored
    fields |= form.adapt(metadata, stored, str(path))
    return HubConfig(fields, str(path))


def _decimal(value: Any) -> Any:
    """A float that was stored in 32 bits as the number that somebody wrote: 1e-5, not 9.9999e-6."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
