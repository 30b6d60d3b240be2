"""Reward models as transformers stores them: a classifier of texts with one label.

Its class (`HubFormat.scorer`) has a matrix `score.weight` [1, embed] in the place of the head, is
read at the last token that is no padding, and adds no bias. Ours does, and `normalise` sets it: no
weight of theirs can hold it. It is kept in the field `score_bias` of config.json, exactly, and a
score is what transformers gives plus that number, which it offers as `model.config.score_bias`.

A text ends with the end token (`CompletionEncoder.whole`), whatever a template writes behind that.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from instar.errors import UserError
from instar.families.family import HubFormat
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout, Tensor
from instar.interchange.card import ModelCard
from instar.interchange.reward import encoder_of
from instar.interchange.tensors import StoredTensor, StoredTensors
from instar.models.spec import ModelSpec

BIAS = "score_bias"
CLASSIFIER = "ForSequenceClassification"  # how the names of such classes end

_LABELS = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
_HEAD = [
    Tensor("score.weight", {"score_head.kernel": "narrow 1 -> 1 narrow"}),
    Tensor(BIAS, {"score_head.bias": "1 -> 1"}),
]


def is_scorer(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a class that classifies texts."""
    names = fields.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(CLASSIFIER) for name in names)


def with_score(layout: Layout) -> Layout:
    """The tensors of a reward model: those below the head, the score's, and one that is the bias.

    The last is in no file; `read_head` adds it to what is.
    """

    def outer(spec: ModelSpec) -> list[Tensor]:
        tensors = layout.outer(spec)
        return [t for t in tensors if not any(p.startswith("head.") for p in t.parts)] + _HEAD

    return dataclasses.replace(layout, outer=outer)


def read_head(
    fields: Mapping[str, Any], form: HubFormat, stored: StoredTensors, source: object
) -> StoredTensors:
    """The tensors of a folder with that of the bias, which its config holds.

    Raises:
      UserError: it has another number of labels than one, another class than the family's, or a
        bias that is no number.
    """
    names, config = fields["architectures"], HubConfig(fields, str(source))
    if names != [form.scorer]:
        known = ", ".join(filter(None, (form.architecture, form.scorer)))
        raise config.error("architectures", f"is {names!r}, and only {known} can be read")
    # transformers writes the names of the labels and not their number, but for two, its default.
    labels = fields.get("id2label")
    count = len(labels) if isinstance(labels, dict) else fields.get("num_labels", 2)
    if count != 1:
        raise UserError(
            f"{source}: num_labels is {count!r}, and a reward model gives one score: train one "
            "with num_labels 1"
        )
    bias = fields.get(BIAS, 0.0)
    sound = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not sound or not abs(bias) <= float(np.finfo(np.float32).max):
        raise config.error(BIAS, f"must be a finite number, not {reprlib.repr(bias)}")
    value = np.asarray([bias], np.float32)
    return {**stored, BIAS: StoredTensor(value.shape, lambda: value)}


def written_head(card: ModelCard) -> dict[str, Any]:
    """The fields of config.json that a language model has not, or otherwise; the bias aside.

    Transformers reads a score before the padding. Where that is the token with which texts end, it
    would read it before the end: such a model has no padding there, so that transformers takes one
    text at a time, and is right, and refuses several.
    """
    fields: dict[str, Any] = dict(_LABELS)
    tokenizer = card.tokenizer
    if tokenizer is not None:
        templated = card.chat_template is not None
        end = encoder_of(card).whole("", "")[-1] if templated else tokenizer.eos_id
        if tokenizer.pad_id == end:
            fields["pad_token_id"] = None
    return fields
