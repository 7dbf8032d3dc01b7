"""Every architecture of transformers that can be built small, and what a tuned model must share with the merged one."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from peft_sparse import ConfigError, iter_deltas
from peft_sparse.core.masked import masked_weight
from peft_sparse.tuners.ada_sft.iteration import iter_masked

VOCABULARY, LENGTH, IMAGE = 99, 12, 32
# What sizes a configuration, by the ends of its fields' names; the first that fits counts.
SIZES: list[tuple[tuple[str, ...], int]] = [
    (("num_key_value_heads", "num_kv_heads"), 2),
    (("attention_heads", "num_heads", "n_head", "n_heads", "num_head"), 4),
    (("num_experts", "num_local_experts", "n_routed_experts"), 4),
    (("num_experts_per_tok", "n_shared_experts", "n_group", "topk_group"), 1),
    (("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    (("vocab_size",), VOCABULARY),
    (("embedding_size",), 16),
    (("intra_bottleneck_size",), 32),
    (("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_source_positions"), 64),
    (("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 48),
    (
        (
            "hidden_size",
            "d_model",
            "embed_dim",
            "n_embd",
            "projection_dim",
            "dim",
            "encoder_hidden_size",
        ),
        32,
    ),
    (("head_dim", "d_kv", "kv_channels"), 8),
    (("image_size",), IMAGE),
    (("patch_size",), 8),
    (("state_size", "ssm_state_size"), 8),
    (("num_labels",), 3),
]
AUTO_CLASSES = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)
LARGEST = 3_000_000


@dataclass
class Finding:
    """What a check of one class gave.

    Attributes:
        outcome: "right", "wrong", "refused" (by an error of ours) or "not built".
        why: in words.
        off: largest relative difference of an output between tuned and merged.
        deltas: number of tensors tuned.
        refused: paths that had to be left out, as the error said.
        notes: wrong gradients.
    """

    outcome: str
    why: str = ""
    off: float = 0.0
    deltas: int = 0
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def model_classes() -> list[str]:
    """Names of the classes, each once."""
    seen: dict[str, None] = {}
    for mapping in AUTO_CLASSES:
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                if model_type in CONFIG_MAPPING_NAMES:
                    seen.setdefault(name)
    return list(seen)


def shrink(config: Any) -> Any:
    """Make a configuration small, in place, and those in it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for ends, size in SIZES if name.endswith(ends)), None)
            if size is not None and value > size:
                setattr(config, name, size)
            elif name.endswith("_token_id") and value >= VOCABULARY:
                setattr(config, name, 1)
        elif isinstance(value, list) and value and all(type(each) is int for each in value):
            if name in ("depths", "layers", "num_layers", "block_repeats"):
                setattr(config, name, [1] * len(value))
            elif "hidden_sizes" in name or name in ("embed_dims", "dims", "channels", "widths"):
                setattr(config, name, [16 * (i + 1) for i in range(len(value))])
    config._attn_implementation = "eager"
    return config


def build(class_name: str) -> nn.Module | None:
    """A small model in evaluation with random weights; None if these rules cannot make one."""
    torch.manual_seed(0)
    try:
        model_class = getattr(transformers, class_name)
        config = shrink(model_class.config_class())
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            return None
        torch.manual_seed(0)
        model: nn.Module = model_class(config).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                # Layer scales and embeddings that start at zero would hide what acts on them.
                if parameter.std(unbiased=False) == 0:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        outputs_of(model)
        return model
    except Exception:  # noqa: BLE001 - whatever keeps a class from being built small is its own affair
        return None


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, LENGTH), generator=generator)
    name = model.main_input_name
    if name == "input_ids":
        given = {"input_ids": ids}
    elif name == "pixel_values":
        size = getattr(model.config, "image_size", IMAGE)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        given = {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    else:
        raise ValueError(f"not text, and no image: {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    return given


def outputs_of(model: nn.Module) -> list[Tensor]:
    """All floating tensors that a forward gives, in the model's order; caches are left out."""
    torch.manual_seed(3)
    output = model(**inputs_for(model.get_base_model() if hasattr(model, "get_base_model") else model))
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
        elif isinstance(value, (tuple, list)):
            for each in value:
                collect(each)

    for name, value in output.items():
        if "cache" not in name and "past" not in name:
            collect(value)
    if not found or not all(bool(torch.isfinite(each).all()) for each in found):
        raise ValueError("no numbers to compare")
    return found


def loss_of(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return sum((each * torch.randn(each.shape, generator=generator)).sum() for each in outputs)


def check(base: nn.Module, config: PeftConfig) -> Finding:
    """Compare an adapter in a model with the same adapter merged: outputs, and the gradient of each of its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tuned, refused = tune(base, config)
        except ValueError as error:
            return Finding("refused", " ".join(str(error).split()))
        before = [each.detach() for each in outputs_of(base)]
        on = outputs_of(tuned)
        loss_of(on).backward()
        merged = copy.deepcopy(tuned).merge_and_unload().eval().requires_grad_(True)
        wanted = outputs_of(merged)
        loss_of(wanted).backward()
    finding = Finding("right", refused=refused)
    finding.off = max(_off(a, b) for a, b in zip(on, wanted, strict=True))
    if not finding.off < 1e-4:
        finding.outcome, finding.why = "wrong", f"the adapter differs by {finding.off:.2g} from the merged model"
    elif all(torch.equal(a, b) for a, b in zip(before, on, strict=True)):
        finding.outcome, finding.why = "wrong", "the adapter does nothing"
    found = list(gradients(tuned, merged))
    finding.deltas = len(found)
    # Some gradients are zero but for rounding: that of a bias in the keys of an attention.
    scale = max((float(dense.abs().max()) for _, _, dense in found if dense is not None), default=0.0)
    for name, gradient, dense in found:
        if gradient is None and dense is not None and float(dense.abs().max()) > 1e-6 * scale:
            finding.notes.append(f"{name} has no gradient")
        elif gradient is not None and dense is not None and _off(gradient, dense, at_least=1e-3 * scale) > 1e-3:
            finding.notes.append(f"{name}: gradient off by {_off(gradient, dense):.2g}")
    if finding.notes and finding.outcome == "right":
        finding.outcome, finding.why = "wrong", "; ".join(finding.notes[:3]) + f" ({len(finding.notes)} tensors)"
    return finding


def tune(base: nn.Module, config: PeftConfig) -> tuple[nn.Module, list[str]]:
    """A copy of the base model with the adapter, without the modules that errors say to exclude; and those."""
    refused: list[str] = []
    while True:
        config.exclude_modules = refused or None
        try:
            return get_peft_model(copy.deepcopy(base), config).eval(), refused
        except ConfigError as error:
            named = re.search(r"exclude_modules=\[(.*?)\]", str(error))
            found = re.findall(r"'([^']+)'", named[1]) if named else []
            if not set(found) - set(refused):
                raise
            refused += found


def gradients(tuned: nn.Module, merged: nn.Module) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """(name, gradient of an adapter's numbers on a tensor, what it must be by the merged model's dense gradient)."""
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    for name, _, _, delta in iter_deltas(tuned):
        dense = parameters[name].grad
        yield name, delta.values.grad, None if dense is None else dense.reshape(-1)[delta.indices.long()]
    for name, layer, masked in iter_masked(tuned):
        dense = parameters[name].grad
        if dense is not None:
            (dense,) = torch.autograd.grad(masked_weight(layer.original, [masked.part]), masked.trained, dense)
        yield name, masked.trained.grad, dense


def _off(a: Tensor, b: Tensor, *, at_least: float = 0.0) -> float:
    scale = max(float(b.abs().max()), at_least) or 1.0
    return float((a.double() - b.double()).abs().max()) / scale
