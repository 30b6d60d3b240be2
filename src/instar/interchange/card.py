"""What goes with the parameters of a model wherever they go."""

import base64
import dataclasses
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.data.tokenizer import Tokenizer, load_tokenizer
from instar.errors import UserError
from instar.models.spec import ModelSpec
from instar.schema import build, to_dict


@dataclass(frozen=True)
class ModelCard:
    """What a model is, apart from its parameters.

    Attributes:
      tokenizer: None where none was found with the model.
      chat_template: the source (Jinja) of its own, None where it has none.
      stop_ids: the tokens that end what it says, as far as its own files tell.
      begins_with_bos: whether the texts that it was trained on begin with a BOS.
      members: how many networks a reward model averages; None for a language model.
    """

    spec: ModelSpec
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    stop_ids: tuple[int, ...] = ()
    begins_with_bos: bool = True
    members: int | None = None

    def stopping_at(self, ids: Iterable[int]) -> "ModelCard":
        """The card of the same model, which more tokens end, such as those of a chat template."""
        return dataclasses.replace(self, stop_ids=tuple(sorted({*self.stop_ids, *ids})))

    def to_json(self) -> dict[str, Any]:
        """The card as JSON, with the files of the tokenizer in it."""
        return {
            "spec": to_dict(self.spec),
            "tokenizer": None if self.tokenizer is None else _pack(self.tokenizer),
            "chat_template": self.chat_template,
            "stop_ids": list(self.stop_ids),
            "begins_with_bos": self.begins_with_bos,
            "members": self.members,
        }

    @staticmethod
    def from_json(values: dict[str, Any], source: object) -> "ModelCard":
        """The reverse of `to_json`.

        Raises:
          UserError: `values`, which `source` held, are no card.
        """
        try:
            spec = build(values["spec"], ModelSpec)
            names = ("tokenizer", "chat_template", "stop_ids", "begins_with_bos")
            files, template, stop_ids, begins_with_bos = (values[name] for name in names)
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"{source} does not say what model it is of ({error})") from None
        tokenizer = None if files is None else _unpack(files)
        members = values.get("members")
        return ModelCard(spec, tokenizer, template, tuple(stop_ids), begins_with_bos, members)


def _pack(tokenizer: Tokenizer) -> dict[str, str]:
    """The files that `Tokenizer.save` writes, in base 64, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = sorted(Path(folder).iterdir())
        return {file.name: base64.b64encode(file.read_bytes()).decode() for file in files}


def _unpack(files: dict[str, str]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / Path(name).name).write_bytes(base64.b64decode(content))
        return load_tokenizer(folder)
