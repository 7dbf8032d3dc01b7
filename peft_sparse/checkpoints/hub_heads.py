"""Prediction heads of AdapterHub's files: flexible ones, which have a config, and static ones of transformers' classes.

Source: the files that adapters 1.3.0 writes; for static heads those of adapter-transformers 1 and 2, which put the
tensors of a model's own head under its own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError

# {head_type: ending of the names of transformers' classes with such a head}.
CLASSES = {
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
_FLEXIBLE = re.compile(r"heads\.(?P<name>[^.]+)\.(?P<number>[0-9]{1,4})\.(?P<part>weight|bias)")
# The layers of static heads, first to last.
_STATIC = ("pre_classifier", "classifier.dense", "classifier.out_proj", "classifier", "qa_outputs")

Linears = list[tuple[Tensor, Tensor | None]]


def read_head(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], *, name: str, path: Path
) -> tuple[dict[str, Any], Linears]:
    """What a head computes, in the library's terms, and its linear layers.

    Args:
        content: of head_config.json.
        tensors: of the file beside it.
        name: of the adapter that it belongs to.
        path: that file, for errors.

    Returns:
        the library's config of a flexible head; of a static one "head_type", "static" (the class of transformers) and
        what the file says of its labels. "label2id" is {label: index}, for all labels, or missing. And [(weight, bias)]
        of the layers in order.

    Raises:
        FormatError: the files are neither, or contradict each other.
    """
    config = content.get("config")
    if isinstance(config, Mapping):
        head, layers = dict(config), _flexible_layers(tensors, content.get("name") or name, path)
    else:
        head, layers = _static_config(content, path), _static_layers(tensors, path)
    if not isinstance(head.get("head_type"), str):
        raise FormatError(f"{path.parent}: head_config.json does not say what kind of head it is (head_type).")
    for weight, bias in layers:
        if weight.dim() != 2 or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
            raise FormatError(f"{path}: a layer of the head must be a matrix and perhaps a bias as long as its rows.")
    head["label2id"] = _labels(head, outputs=layers[-1][0].shape[0], path=path)
    return head, layers


def _flexible_layers(tensors: Mapping[str, Tensor], name: str, path: Path) -> Linears:
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FLEXIBLE.fullmatch(key)
        if match is None:
            raise FormatError(f"{path} holds {key!r}, which is no part of a head of linear layers.")
        if match["name"] != name:
            raise FormatError(f"{path} holds {key!r}, of another head than that of {name!r}.")
        layer = found.setdefault(int(match["number"]), {})
        if match["part"] in layer:
            raise FormatError(f"{path} holds {key!r} twice.")
        layer[match["part"]] = tensor
    return _in_order([found[number] for number in sorted(found)], path)


def _static_layers(tensors: Mapping[str, Tensor], path: Path) -> Linears:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if layer not in _STATIC or part not in ("weight", "bias"):
            raise FormatError(
                f"{path} holds {key!r}, which is no part of a head of linear layers. Heads for sequences, tokens and "
                "questions can be imported; load the adapter without it (with_head=False)."
            )
        found.setdefault(layer, {})[part] = tensor
    return _in_order([found[layer] for layer in _STATIC if layer in found], path)


def _in_order(layers: list[dict[str, Tensor]], path: Path) -> Linears:
    if not layers or any("weight" not in layer for layer in layers):
        raise FormatError(f"{path} holds no head, or a layer of it without its weight.")
    return [(layer["weight"], layer.get("bias")) for layer in layers]


def _static_config(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    class_name = content.get("model_class")
    kinds = [kind for kind, ending in CLASSES.items() if isinstance(class_name, str) and class_name.endswith(ending)]
    if not kinds:
        raise FormatError(
            f"{path.parent}: head_config.json has neither a flexible head's config nor a model_class whose head is "
            f"known ({', '.join(CLASSES.values())}), got {class_name!r}."
        )
    known = ("num_labels", "label2id", "id2label", "model_type")
    return {"head_type": kinds[0], "static": class_name, **{key: content[key] for key in known if key in content}}


def _labels(head: Mapping[str, Any], *, outputs: int, path: Path) -> dict[str, int] | None:
    """{label: index} of all labels of a head; None where the file does not say."""
    where = f"{path.parent}: head_config.json"
    count = head.get("num_labels")
    if count is not None and count != outputs and head["head_type"] != "question_answering":
        raise FormatError(f"{where} says num_labels={count!r}, but the head beside it has {outputs} outputs.")
    labels, back = head.get("label2id"), head.get("id2label")
    if not labels and isinstance(back, Mapping):
        labels = {label: index for index, label in back.items()}
    if not labels:
        return None
    try:
        found = {str(label): int(index) for label, index in dict(labels).items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{where} must map labels to numbers (label2id), got {str(labels)[:80]}.") from error
    # The two outputs of a head for questions, where an answer begins and ends, have no labels.
    if sorted(found.values()) != list(range(outputs)) and head["head_type"] != "question_answering":
        raise FormatError(
            f"{where} must number the {outputs} labels of the head from 0 (label2id), got {str(found)[:200]}."
        )
    return found
