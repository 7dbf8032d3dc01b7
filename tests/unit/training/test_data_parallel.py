"""Training under `nn.DataParallel`, as transformers' trainers do with several GPUs in one process: as on one device."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    SpielAGConfig,
    SpielMAConfig,
    rate_scales,
    resident,
)
from tests.support.models import llama
from tests.support.replicas import OnReplicas
from tests.support.training import deltas, make_args

SPIEL = {"density": 0.05, "target_modules": "all", "reselection_steps": 3, "estimation_steps": 2}
CONFIGS = {
    "random": (RandConfig, {"density": 0.05, "target_modules": "all", "fitted_rate": True}),
    "SpIEL-AG": (SpielAGConfig, SPIEL),
    "SpIEL-AG, several micro-batches": (SpielAGConfig, {**SPIEL, "nomination_updates": 1, "fitted_rate": True}),
    "SpIEL-MA": (SpielMAConfig, SPIEL),
    "LT-SFT": (LotteryTicketConfig, {"density": 0.05, "target_modules": "all", "l1": 0.1}),
    "gradients": (OneShotConfig, {"density": 0.05, "criterion": "fisher"}),
    "Ada-SFT": (AdaSftConfig, {}),
}
IDS = torch.randint(3, 20, (24, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]
ANY = ("random", "SpIEL-AG", "SpIEL-AG, several micro-batches", "SpIEL-MA")


def tuned(name):
    kind, fields = CONFIGS[name]
    return get_peft_model(llama(), kind(task_type="CAUSAL_LM", **fields))


def train(name, folder, kind, *, num_gpus, monkeypatch):
    model = tuned(name)
    args = make_args(folder, per_device_train_batch_size=4 // num_gpus, max_steps=8)
    if num_gpus > 1:
        monkeypatch.setattr(TrainingArguments, "n_gpu", num_gpus)
        monkeypatch.setattr(torch.nn, "DataParallel", OnReplicas)
    trainer = kind(model=model, args=args, train_dataset=ROWS)
    trainer.train()
    assert isinstance(trainer.model_wrapped, OnReplicas) is (num_gpus > 1)
    state = {n: p.detach().clone() for n, p in model.named_parameters() if "ada_sft" in n}
    return deltas(model), rate_scales(model) if CONFIGS[name][1].get("fitted_rate") else {}, state


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, SparseTrainer) for name in CONFIGS), *((name, Trainer) for name in ANY)]
)
def test_two_devices_train_what_one_does(name, kind, tmp_path, monkeypatch):
    one, scales, weights = train(name, tmp_path, kind, num_gpus=1, monkeypatch=monkeypatch)
    two, same_scales, same_weights = train(name, tmp_path, kind, num_gpus=2, monkeypatch=monkeypatch)
    assert two.keys() == one.keys()
    for tensor, (indices, values) in one.items():
        assert torch.equal(two[tensor][0], indices), tensor
        torch.testing.assert_close(two[tensor][1], values, rtol=1e-3, atol=1e-5)
    assert same_scales == pytest.approx(scales, rel=1e-5)
    torch.testing.assert_close(same_weights, weights, rtol=1e-3, atol=1e-5)


def test_weights_with_deltas_in_them_are_not_copied():
    model = tuned("random").eval()
    for _, values in deltas(model).values():
        values.normal_()
    ids = torch.arange(8).view(2, 4)
    expected = model(input_ids=ids).logits
    with resident(model):
        torch.testing.assert_close(OnReplicas(model)(input_ids=ids).logits, expected)
        model(input_ids=ids)
        with pytest.raises(ConfigError, match=r"nn\.DataParallel copies .* Leave that block, or start one process"):
            OnReplicas(model)(input_ids=ids)
    torch.testing.assert_close(OnReplicas(model)(input_ids=ids).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(OnReplicas(model)(input_ids=ids).logits, expected)
    with model.disable_adapter(), pytest.raises(ConfigError, match="merge_adapter"):
        OnReplicas(model)(input_ids=ids)
