"""Bottleneck adapters and hypernetworks in several processes: every function runs in each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import save_and_load
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer

from peft_sparse import BottleneckConfig, BottleneckWeights, MadGConfig, bottleneck_weights, set_bottleneck_weights
from peft_sparse.core.sharded import whole
from tests.support.distributed.refusals import told
from tests.support.distributed.training import batch, rank_and_world
from tests.support.models import bert
from tests.support.training import VOCAB

_made = torch.Generator().manual_seed(5)
VECTORS = {code: torch.rand(6, generator=_made) for code in ("eng", "quy", "ace", "bxr")}

CONFIGS: dict[str, list[Any]] = {
    "pfeiffer": [BottleneckConfig(bottleneck_size=4)],
    "houlsby": [BottleneckConfig(kind="houlsby", bottleneck_size=4, activation="gelu", scaling="learned")],
    "nice": [BottleneckConfig(bottleneck_size=4, invertible="nice")],
    "stack": [BottleneckConfig(bottleneck_size=4, invertible="nice"), BottleneckConfig(bottleneck_size=3)],
    "MAD-G": [MadGConfig(bottleneck_size=4, language_dim=3, typology=VECTORS)],
    "MAD-G-LS": [MadGConfig(bottleneck_size=4, language_dim=3, layer_dim=2, typology=VECTORS)],
}
LANGUAGES = {
    "a language per process": lambda rows: [["quy", "ace"][row % 2] for row in range(rows)],
    "a language per example": lambda rows: [["quy", "ace", "ace", "eng", "bxr"][row % 5] for row in range(rows)],
}


def make_masked_lm(**changes: Any) -> BertForMaskedLM:
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bert(vocab_size=VOCAB, intermediate_size=32, **rates, **changes).double().train()


def make_adapted(name: str, base: nn.Module | None = None) -> PeftModel:
    """The adapters of a row of `CONFIGS`, one above the other; the last of them trains."""
    base, configs = base or make_masked_lm(), CONFIGS[name]
    model = get_peft_model(base, configs[0], adapter_name="first", autocast_adapter_dtype=False)
    for config in configs[1:]:
        model.add_adapter("second", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(["first", "second"])
        model.set_requires_grad("first", requires_grad=False)
    made = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=made).to(parameter)
    return model.train()


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name without wrappers: parameter} of all adapters."""
    return {
        name.replace("module.", "").replace("_fsdp_wrapped_", ""): parameter
        for name, parameter in model.named_parameters()
        if ".first." in name or ".second." in name
    }


def inputs(number: int, languages: str | None, rows: int = 10) -> dict[str, Any]:
    """This process's share of a batch, with a language or one for each of its examples."""
    rank, world = rank_and_world()
    found: dict[str, Any] = batch(number, rows)
    found["labels"] = found["input_ids"] = found["input_ids"].contiguous()
    if languages is not None:
        own = LANGUAGES[languages](rows)[rank::world]
        found["language"] = own[0] if len(set(own)) == 1 else own
    return found


def train(wrapped: nn.Module, model: nn.Module, languages: str | None, *, steps: int = 4, accumulate: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            if hasattr(wrapped, "set_requires_gradient_sync"):
                wrapped.set_requires_gradient_sync(micro == accumulate - 1)
            (wrapped(**inputs(10 * step + micro, languages)).loss / accumulate).backward()
        optimizer.step()


def found_in(model: nn.Module) -> dict[str, Any]:
    """Weights of all adapters and gradients of the last step, whole."""
    found: dict[str, Any] = {}
    for name, parameter in adapter_parameters(model).items():
        found[name] = whole(parameter).clone()
        found[f"gradient of {name}"] = None if parameter.grad is None else whole(parameter.grad).clone()
    return found


def train_ddp(name: str, languages: str | None = None) -> dict[str, Any]:
    model = make_adapted(name)
    train(DistributedDataParallel(model) if dist.is_initialized() else model, model, languages)
    return found_in(model)


def shard(model: PeftModel, *, embeddings: bool = False, **options: Any) -> None:
    """Every block a unit, the embeddings too if asked for, the rest another."""
    bert = model.get_base_model().bert
    for block in (*bert.encoder.layer, *([bert.embeddings] if embeddings else [])):
        fully_shard(block, **options)
    fully_shard(model, **options)


def train_fsdp(
    name: str,
    languages: str | None = None,
    *,
    checkpointing: bool | None = None,
    accumulate: int = 1,
    embeddings: bool = False,
    **options: Any,
) -> dict[str, Any]:
    # FSDP2 takes no matrix for two of its units.
    model = make_adapted(name, make_masked_lm(tie_word_embeddings=not embeddings))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    if dist.is_initialized():
        shard(model, embeddings=embeddings, **options)
    train(model, model, languages, accumulate=accumulate)
    return found_in(model)


def verbs(name: str, folder: str) -> dict[str, Any]:
    """What can be done with a model that is sharded if there are several processes; files are written by each."""
    model = make_adapted(name)
    is_generator = name.startswith("MAD-G")
    languages = "a language per process" if is_generator else None
    model.train()
    rank, world = rank_and_world()
    own = f"{folder}/{world}-{rank}"
    if world > 1 and name == "houlsby":
        fully_shard(model)
    elif world > 1:
        shard(model)
    train(model, model, languages, steps=2)
    model.eval()
    if is_generator:
        model.set_language("quy")
    found: dict[str, Any] = {"trained": logits(model)}
    model.save_pretrained(own, selected_adapters=["first"])
    if is_generator:
        found["generated"] = {path: w.down_weight for path, w in model.generate_adapter("ace").weights.items()}
        found["importance"] = model.feature_importance().total
    else:
        weights = {path: BottleneckWeights(*map(whole, w)) for path, w in bottleneck_weights(model, "first").items()}
        half = {path: BottleneckWeights(*(0.5 * tensor for tensor in w)) for path, w in weights.items()}
        set_bottleneck_weights(model, half, "first")
        found["half"] = logits(model)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.mul_(0)
    found["zeroed"] = logits(model)
    load_into(model, own)
    found["loaded"] = logits(model)
    if world > 1:
        # FSDP2 leaves the root's parameters whole after a forward, and nothing below it tells then.
        model.reshard()
        found["refused"] = [told(lambda: model.add_adapter("third", CONFIGS[name][0])), told(model.merge_and_unload)]
        found["still"] = logits(model)
    found["adapters"] = sorted(model.peft_config)
    return found


def load_into(model: PeftModel, folder: str) -> None:
    # With a transformers that shards adapters itself, PEFT cuts up what it loads; with others it does not.
    save_and_load.is_transformers_dtensor_tp = False
    set_peft_model_state_dict(model, load_peft_weights(f"{folder}/first", device="cpu"), adapter_name="first")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(12).view(2, 6)).logits.clone()


def trained_under_fsdp1(name: str, languages: str | None = None) -> tuple[str, str] | dict[str, Any]:
    model = make_adapted(name)
    if not dist.is_initialized():
        train(model, model, languages)
        return {key: value for key, value in found_in(model).items() if "gradient" not in key}
    blocks = ModuleWrapPolicy({BertLayer})
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=blocks
    )
    refusal = told(lambda: train(wrapped, model, languages))
    if refusal[0]:
        return refusal
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {key: value for key, value in found_in(model).items() if "gradient" not in key}


def several(variants: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """One training after the other, by name: starting processes takes longer than most of them."""
    return {name: globals()[case](**options) for name, (case, options) in variants.items()}
