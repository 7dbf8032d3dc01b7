"""Prediction heads between AdapterHub's files and transformers' models: which computes the same, and whose labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..._peft_bridge import ModulesToSaveWrapper
from ...checkpoints.adapter_hub import HubAdapter
from ...checkpoints.hub_heads import CLASSES
from ...errors import FormatError

logger = logging.getLogger(__name__)

_HEAD_MODULES = {"classification": "classifier", "tagging": "classifier", "question_answering": "qa_outputs"}
# How transformers' classifiers of sequences compute, in the library's terms, by model_type: one layer behind the
# pooler, or two layers on the first token with an activation between them. And the modules that hold the layers.
_POOLED: dict[str, Any] = {"layers": 1, "use_pooler": True}
_TWO_LAYERS: dict[str, Any] = {"layers": 2, "use_pooler": False, "activation_function": "tanh"}
_Way = tuple[dict[str, Any], tuple[str, ...]]
_ROBERTA: list[_Way] = [(_TWO_LAYERS, ("classifier",))]
# BERT's pooler is a layer on the first token with a tanh behind it, so with the classifier it is a head of two layers.
_BERT: list[_Way] = [(_POOLED, ("classifier",)), (_TWO_LAYERS, ("pooler", "classifier"))]
_CLASSIFIERS: dict[str, list[_Way]] = {
    **dict.fromkeys(("bert", "albert"), _BERT),
    **dict.fromkeys(("roberta", "camembert", "xlm-roberta"), _ROBERTA),
    "electra": [({**_TWO_LAYERS, "activation_function": "gelu"}, ("classifier",))],
    "distilbert": [({**_TWO_LAYERS, "activation_function": "relu"}, ("pre_classifier", "classifier"))],
}


@dataclass(frozen=True)
class HeadPlan:
    """How the head of a file goes into a model.

    Attributes:
        modules: the names of the modules of the model that take its layers; they are saved with the adapter.
        tensors: [(weight, bias)] of the layers in order, the last one's rows in the order of the model's labels.
        labels: names to give to the model's outputs, in order; None leaves those that it has.
    """

    modules: tuple[str, ...]
    tensors: Sequence[tuple[Tensor, Tensor | None]]
    labels: tuple[str, ...] | None


def _ways(base: nn.Module) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """What the head of a model computes, in the library's terms, and where its layers are: one way or several."""
    kinds = [kind for kind, ending in CLASSES.items() if type(base).__name__.endswith(ending)]
    if not kinds:
        return []
    (kind,) = kinds
    if kind == "classification":
        ways = _CLASSIFIERS.get(getattr(base.config, "model_type", None) or "", [])
    else:
        ways = [({"layers": 1}, (_HEAD_MODULES[kind],))]
    return [({"head_type": kind, **computes}, modules) for computes, modules in ways]


def head_of(base: nn.Module) -> dict[str, Any] | None:
    """The library's config of the head that the model has; None if the library has no such head."""
    ways = _ways(base)
    if not ways:
        return None
    label2id = {str(label): index for index, label in base.config.id2label.items()}
    about = {"num_labels": base.config.num_labels, "label2id": label2id, "dropout_prob": None, "bias": True}
    return {"activation_function": "tanh", **about, **ways[0][0]}


def head_layers(base: nn.Module, adapter_name: str | None = None) -> list[nn.Linear]:
    """The layers of the model's head, of an adapter's own copy where it has one."""
    return _linears(base, _ways(base)[0][1], adapter_name)


def _linears(base: nn.Module, modules: Sequence[str], adapter_name: str | None = None) -> list[nn.Linear]:
    found = []
    for name in modules:
        [module] = [m for path, m in base.named_modules() if path == name or path == f"{base.base_model_prefix}.{name}"]
        if isinstance(module, ModulesToSaveWrapper):
            has_own = adapter_name in module.modules_to_save
            module = module.modules_to_save[adapter_name] if has_own else module.original_module
        found += [part for part in module.modules() if isinstance(part, nn.Linear)]
    return found


def plan_head(base: nn.Module, adapter: HubAdapter) -> HeadPlan:
    """Find the modules of a model that compute what the file's head computes, and match their labels.

    Raises:
        FormatError: there is no head in the files, the model has none that computes the same, or their labels differ.
    """
    if adapter.head is None or not adapter.head_tensors:
        raise FormatError(f"adapter {adapter.name!r} comes without a head: leave with_head out.")
    theirs = _computes(adapter, base)
    file = [tuple(weight.shape) for weight, _ in adapter.head_tensors]
    shapes: list[list[tuple[int, ...]]] = []
    for own, modules in _ways(base):
        linears = _linears(base, modules)
        shapes.append([tuple(linear.weight.shape) for linear in linears])
        lacks_bias = any(
            bias is not None and linear.bias is None
            for linear, (_, bias) in zip(linears, adapter.head_tensors, strict=False)
        )
        same = ["head_type", "layers"]
        if own["head_type"] == "classification":
            same += ["use_pooler", "activation_function"] if own["layers"] > 1 else ["use_pooler"]
        if file == shapes[-1] and not lacks_bias and all(own[key] == theirs[key] for key in same):
            labels, order = _match_labels(base, adapter.head.get("label2id"), outputs=file[-1][0])
            weight, bias = adapter.head_tensors[-1]
            last = (weight[order], None if bias is None else bias[order])
            return HeadPlan(modules, [*adapter.head_tensors[:-1], last], labels)
    outputs = {layers[-1][0] for layers in shapes if layers}
    way_out = (
        f"If only the number of labels differs, make the model with num_labels={file[-1][0]}. "
        if outputs and outputs != {file[-1][0]}
        else ""
    )
    raise FormatError(
        f"the head of adapter {adapter.name!r} ({theirs['head_type']}, layers {file}, use_pooler="
        f"{theirs['use_pooler']}, {theirs['activation_function']}) has no counterpart in {type(base).__name__} (layers "
        f"{' or '.join(map(str, shapes)) or 'none'}). {way_out}Load the adapter without it (with_head=False), and "
        "build the head from read_adapter_hub(folder).head_tensors."
    )


def _computes(adapter: HubAdapter, base: nn.Module) -> dict[str, Any]:
    """What a file's head computes, in the library's terms."""
    head = adapter.head or {}
    default = {"use_pooler": False, "activation_function": "tanh", "layers": len(adapter.head_tensors)}
    if "static" not in head:
        config = {**default, **head}
        return {**config, "use_pooler": bool(config["use_pooler"]), "layers": len(adapter.head_tensors)}
    # A head of transformers' own class computes what that class computes.
    model_type = head.get("model_type") or adapter.about.get("model_type") or base.config.model_type
    own = _CLASSIFIERS.get(model_type, [({}, ())])[0][0] if head["head_type"] == "classification" else {}
    return {**default, **own, "head_type": head["head_type"]}


def _match_labels(
    base: nn.Module, theirs: Mapping[str, int] | None, *, outputs: int
) -> tuple[tuple[str, ...] | None, list[int]]:
    """(new names of the model's outputs or None, which row of the file's last layer each output takes)."""
    as_they_are = list(range(outputs))
    if type(base).__name__.endswith(CLASSES["question_answering"]):
        return None, as_they_are
    own = {str(label): int(index) for index, label in base.config.id2label.items()}
    is_named = own != {f"LABEL_{index}": index for index in as_they_are}
    if theirs is None or all(label == f"LABEL_{index}" for label, index in theirs.items()):
        if is_named:
            logger.warning(
                "The files of the head do not say what its labels are. They are taken to be those of the model, in "
                "this order: %s.",
                list(own),
            )
        return None, as_they_are
    if not is_named:
        return tuple(sorted(theirs, key=lambda label: theirs[label])), as_they_are
    if own.keys() != theirs.keys() or sorted(own.values()) != as_they_are:
        raise FormatError(
            f"the labels of the file's head, {sorted(theirs, key=lambda label: theirs[label])}, are not those of the "
            f"model, {list(own)} (config.id2label). Make the model with num_labels={outputs} and no names for them: it "
            "takes the file's. Or load the adapter without its head (with_head=False)."
        )
    rows = {own[label]: theirs[label] for label in own}
    return None, [rows[index] for index in as_they_are]


@torch.no_grad()
def load_head(base: nn.Module, adapter_name: str, plan: HeadPlan) -> None:
    """Copy a head into the modules that an adapter saves, and name the model's outputs."""
    for linear, (weight, bias) in zip(_linears(base, plan.modules, adapter_name), plan.tensors, strict=True):
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        elif linear.bias is not None:
            linear.bias.zero_()
    if plan.labels is not None:
        base.config.id2label = dict(enumerate(plan.labels))
        base.config.label2id = {label: index for index, label in enumerate(plan.labels)}
