"""Our configs in the shapes that PEFT's tests are parametrised over, and the ones that take LoRA's place."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    DeftXConfig,
    LotteryTicketConfig,
    MadGConfig,
    OneShotConfig,
    RandConfig,
    SparseConfig,
)

# Most test models have layers of a few dozen weights: a density that leaves several in each.
DENSITY = 0.3
_DENSE = {"density": DENSITY}
# Enough for layers of one or two weights to get one.
_DENSER = {"density": 0.7}
# Before its dense phase a lottery ticket holds no weight at all; this one holds a random ticket, as after it.
_LOTTERY = {**_DENSE, "init_weights": False}
# The tests want a fresh adapter to be the identity. Not relu: three dead units have no gradient.
_BOTTLENECK = {"bottleneck_size": 3, "activation": "tanh", "init": "identity"}
# The tests know of no languages: one is set from the start.
_MAD_G = {"language_dim": 2, "typology": {"eng": [1.0, 0.0, 1.0]}, "language": "eng", **_BOTTLENECK}


def _custom(model: str, *requests: dict[str, Any]) -> list[tuple[str, str, type, dict[str, Any]]]:
    return [
        (f"{model} {number} Rand", model, RandConfig, {**_DENSE, **request})
        for number, request in enumerate(requests, 1)
    ]


# "test_name, model_id, config_cls, config_kwargs"
CUSTOM_MODELS = [
    *_custom(
        "MLP",
        {"target_modules": "lin0"},
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "target_biases": True},
        {"target_modules": ["lin0", "lin1"], "budget": "global"},
        {"target_modules": ["lin0", "lin1"], "budget": {"lin0": 0.75, "lin1": 0.25}},
        {"target_modules": "all"},
        {"target_modules": "all-linear"},
        {"target_parameters": ["lin0.weight", "lin1.bias"]},
    ),
    ("MLP 12 Rand", "MLP", RandConfig, {"num_weights": 40, "target_modules": ["lin0"], "seed": 3}),
    ("MLP 13 Rand", "MLP", RandConfig, {"equivalent_rank": 1, "target_modules": ["lin0"]}),
    ("MLP 1 Sparse", "MLP", SparseConfig, {**_DENSE, "target_modules": ["lin0"]}),
    ("MLP 1 LotteryTicket", "MLP", LotteryTicketConfig, {**_LOTTERY, "target_modules": ["lin0", "lin1"]}),
    ("MLP 1 DeftX", "MLP", DeftXConfig, {**_LOTTERY, "target_modules": ["lin0", "lin1"]}),
    ("MLP 1 Ada", "MLP", AdaSftConfig, {"target_modules": ["lin0"]}),
    ("MLP 2 Ada", "MLP", AdaSftConfig, {"target_modules": ["lin0", "lin1"], "phase": "weights"}),
    ("MLP 3 Ada", "MLP", AdaSftConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D 1 Ada", "EmbConv1D", AdaSftConfig, {"target_modules": ["conv1d"]}),
    ("MLP 1 OneShot", "MLP", OneShotConfig, {**_LOTTERY, "target_modules": ["lin0", "lin1"]}),
    (
        "MLP 2 OneShot",
        "MLP",
        OneShotConfig,
        {**_DENSE, "target_modules": ["lin0", "lin1"], "criterion": "largest_weight", "budget": "uniform"},
    ),
    *_custom(
        "EmbConv1D",
        {"target_modules": ["emb"]},
        {"target_modules": ["conv1d"]},
        {"target_modules": ["emb", "conv1d", "lin0"]},
        {"target_modules": "all", **_DENSER},
    ),
    *_custom(
        "Conv1d",
        {"target_modules": ["conv1d"]},
        {"target_modules": ["conv1d", "lin0"], "target_biases": True, **_DENSER},
    ),
    *_custom("Conv1dBigger", {"target_modules": ["conv1d"]}),
    *_custom("Conv1dGroups", {"target_modules": ["conv1d"]}),
    *_custom("Conv2d", {"target_modules": ["conv2d"]}, {"target_modules": ["conv2d", "lin0"], "target_biases": True}),
    *_custom("Conv2d1x1", {"target_modules": ["conv2d"]}),
    *_custom("Conv2dGroups", {"target_modules": ["conv2d"]}),
    *_custom("Conv2dGroups2", {"target_modules": ["conv2d"]}),
    *_custom(
        "MLP_LayerNorm", {"target_modules": ["layernorm0", "lin0"]}, {"target_modules": ["lin0"], "target_norms": True}
    ),
    *[
        (f"{model} {kind} Bottleneck", model, BottleneckConfig, {**_BOTTLENECK, "kind": kind, **request})
        for model, kind, request in (
            ("MLP", "houlsby", {"target_modules": ["lin0", "lin1"]}),
            ("MLP", "houlsby", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            # From the exact identity one step does not move the down-projections far enough for the test.
            ("MLP_LayerNorm", "pfeiffer", {"target_modules": ["layernorm0"], "init": "near_identity"}),
        )
    ],
    ("MLP 1 MadG", "MLP", MadGConfig, {**_MAD_G, "kind": "houlsby", "target_modules": ["lin0", "lin1"]}),
    (
        *("MLP 2 MadG", "MLP", MadGConfig),
        {**_MAD_G, "kind": "houlsby", "layer_dim": 2, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
]


def _two(
    name: str, first: dict[str, Any], second: dict[str, Any]
) -> tuple[str, str, type, dict[str, Any], dict[str, Any]]:
    off = {"init_weights": False, **_DENSE}
    return (name, "sparse_ft", RandConfig, {**off, **first}, {**off, "seed": 1, **second})


# "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2"
TWO_ADAPTERS = [
    _two("Rand Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    _two("Rand Same Support", {"target_modules": ["lin0"], "seed": 1}, {"target_modules": ["lin0"]}),
    _two("Rand Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    _two("Rand Biases", {"target_modules": ["lin0"], "target_biases": True}, {"target_modules": ["lin0", "lin1"]}),
]


def on_hub_models(task_type: str) -> list[tuple[type, dict[str, Any]]]:
    """`config_cls, config_kwargs` for the models of a task."""
    task = {"task_type": task_type, "density": 0.1}
    if task_type == "FEATURE_EXTRACTION":
        # The pooler comes after the hidden states, which are all that the tests look at.
        task["exclude_modules"] = ".*pooler.*"
    every_kind = {
        "target_modules": "all-linear",
        "target_biases": True,
        "target_norms": True,
        "budget": "global",
        "density": 0.6,
    }
    return [
        (BottleneckConfig, {"task_type": task_type, "bottleneck_size": 4, "activation": "tanh"}),
        (RandConfig, task),
        (RandConfig, {**task, **every_kind}),
        (SparseConfig, {**task, "target_modules": "all"}),
        (LotteryTicketConfig, {**task, "init_weights": False}),
        (AdaSftConfig, task),
        (OneShotConfig, {**task, "criterion": "smallest_weight"}),
    ]


QUANTISED = [(RandConfig, {"target_modules": ["q_proj", "v_proj"], "density": 0.1, "task_type": "CAUSAL_LM"})]


class Rand:
    """Gives RandConfigs of a default density, for tests that name only their targets."""

    def __new__(cls, **fields: Any) -> RandConfig:
        return RandConfig(**{**_DENSE, **fields})


# "config_cls": tests that make the config themselves, from nothing but target_modules.
CLASSES = [Rand]
# "config_class, mandatory_kwargs"
WITH_MANDATORY = [
    (cls, dict(_DENSE))
    for cls in (RandConfig, SparseConfig, LotteryTicketConfig, DeftXConfig, OneShotConfig, AdaSftConfig)
]

_SHARED_FIELDS = (
    "task_type",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
_SHARED_FIELDS += (
    "trainable_token_indices",
    "target_parameters",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
)
# How much LoRA changes and with how many parameters: our density stands for it.
_SIZE_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora")
_seeds = itertools.count()


def in_place_of_lora(**fields: Any) -> PeftConfig:
    """The config of ours that asks for what `LoraConfig(**fields)` asks for; each call draws another support.

    Skips the test when a field asks for what only LoRA has (DoRA, rank patterns, ...).
    """
    fields = {name: value for name, value in fields.items() if name not in _SIZE_FIELDS}
    initial = fields.pop("init_lora_weights", True)
    foreign = {name for name, value in fields.items() if name not in _SHARED_FIELDS and value}
    if foreign or not isinstance(initial, bool):
        pytest.skip(f"only LoRA has {sorted(foreign) or 'init_lora_weights=' + repr(initial)}")
    fields = {name: value for name, value in fields.items() if name in _SHARED_FIELDS}
    return RandConfig(seed=next(_seeds), init_weights=initial, **_DENSE, **fields)


class StandIn:
    """What a test finds under the name `LoraConfig`."""

    def __new__(cls, **fields: Any) -> PeftConfig:
        return in_place_of_lora(**fields)


def translate(config: LoraConfig) -> PeftConfig | None:
    """Our config for a LoraConfig that a test is parametrised over, or None where only LoRA can do it."""
    plain = LoraConfig()
    differing = {name: value for name, value in config.to_dict().items() if value != getattr(plain, name, None)}
    differing.pop("peft_type", None)
    differing.pop("peft_version", None)
    try:
        return in_place_of_lora(**differing)
    except pytest.skip.Exception:
        return None
