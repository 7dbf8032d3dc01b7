"""What `pytest -m gpu` runs on whole models: training, saving, generating, each against the CPU or float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_sparse import (
    SM3,
    AdaSftConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseAdamW,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    resident,
    select_by_gradients,
    start_dense_phase,
    start_weight_phase,
)
from peft_sparse.selection.rows import num_rows, rows_of
from tests.numerics import test_spiel_loop
from tests.support import models
from tests.support.bottleneck import Case as BottleneckCase
from tests.support.bottleneck import tensors_of
from tests.support.distributed import training as training_cases
from tests.support.exact import IDS as BOTTLENECK_IDS
from tests.support.gpu import DEVICE, MARKS, exact_float32  # noqa: F401 (a fixture of every test)
from tests.support.madg import MadGCase
from tests.support.oracle import relative_error
from tests.support.training import make_bert

pytestmark = MARKS
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def llama(dtype: torch.dtype = F32) -> nn.Module:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 80}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
    return models.llama(**sizes, **heads, **special).to(dtype).train()


def ids(seed: int = 0, device: str = DEVICE) -> Tensor:
    return torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(seed)).to(device)


def loss_of(model: nn.Module, given: Tensor) -> Tensor:
    return model(input_ids=given, labels=given).loss


def trained(config, device: str, *, updates: int = 9, is_resident: bool = False, optimizer=SparseAdamW) -> PeftModel:
    """A tiny Llama in float64 after a few updates, which are the same on every device."""
    model = get_peft_model(llama().to(device), config).double().to(device)
    deltas = [delta for _, _, _, delta in iter_deltas(model)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = SM3(parameters, lr=0.05, deltas=deltas) if optimizer is SM3 else optimizer(parameters, lr=0.01)
    with resident(model) if is_resident else torch.enable_grad():
        for update in range(updates):
            loss_of(model, ids(update, device)).backward()
            steps.step()
            steps.zero_grad()
    return model


def assert_same(own: nn.Module, other: nn.Module) -> None:
    """The same support, and values that differ by what a Llama computes in float32 (its rotary embedding), and SpIEL
    (its estimates).
    """
    found = {name: delta for name, _, _, delta in iter_deltas(other)}
    for name, _, _, delta in iter_deltas(own):
        assert torch.equal(delta.indices.cpu(), found[name].indices.cpu()), name
        torch.testing.assert_close(delta.values.cpu(), found[name].values.cpu(), rtol=1e-4, atol=1e-7)


QUICK = {"reselection_steps": 4, "estimation_steps": 2, "total_steps": 12}
TRAININGS = {
    "rand": (RandConfig(density=0.05), torch.optim.AdamW),
    "rand, everything": (RandConfig(density=0.05, target_modules="all", budget="global"), SparseAdamW),
    "rand, rows": (RandConfig(density=0.05, support_rows=0.2), SparseAdamW),
    "ag": (SpielAGConfig(density=0.05, **QUICK), SparseAdamW),
    "ag, rows": (SpielAGConfig(density=0.05, support_rows=0.2, **QUICK), SparseAdamW),
    "ma": (SpielMAConfig(density=0.05, **QUICK), SM3),
}


@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_the_cpus(name, is_resident):
    config, optimizer = TRAININGS[name]
    own = trained(config, DEVICE, is_resident=is_resident, optimizer=optimizer)
    assert_same(own, trained(config, "cpu", optimizer=optimizer))
    if config.support_rows is not None:
        for _, _, _, delta in iter_deltas(own):
            assert rows_of(delta.indices, delta.shape).numel() <= num_rows(config.support_rows, delta.shape)


@pytest.mark.parametrize("mode", ["plain", "resident", "checkpointing"])
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_spiel_equals_its_reference(method, mode):
    test_spiel_loop.run(method, accumulate=2, clip=0.5, mode=mode, device=DEVICE)


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("criterion", ["fisher", "weight_times_gradient", "largest_weight"])
def test_one_shot_selection_is_the_cpus(criterion, share):
    models = []
    for device in (DEVICE, "cpu"):
        config = OneShotConfig(density=0.05, criterion=criterion, selection_batches=2, support_rows=share)
        model = get_peft_model(llama().double().to(device), config)
        if criterion != "largest_weight":
            select_by_gradients(model, [{"input_ids": ids(n, device), "labels": ids(n, device)} for n in range(2)])
        models.append(model)
    assert_same(*models)


def test_a_dense_phase_is_the_cpus():
    models = []
    for device in (DEVICE, "cpu"):
        model = get_peft_model(llama().double().to(device), LotteryTicketConfig(density=0.05, support_rows=0.5))
        phase = start_dense_phase(model)
        steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for update in range(2):
            loss_of(model, ids(update, device)).backward()
            steps.step()
            steps.zero_grad()
        phase.start_sparse_phase()
        models.append(model)
    assert_same(*models)


def test_ada_sft_is_the_cpus():
    losses = []
    for device in (DEVICE, "cpu"):
        model = get_peft_model(llama().double().to(device), AdaSftConfig(target_modules="all-linear")).double()
        found = []
        for phase in range(2):
            if phase:
                start_weight_phase(model)
                model.double()
            steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
            for _ in range(3):
                loss = loss_of(model, ids(0, device))
                loss.backward()
                steps.step()
                steps.zero_grad()
                found.append(float(loss))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("request_name", ["pfeiffer with nice", "houlsby", "parallel"])
def test_bottleneck_adapters_equal_the_formulas(request_name):
    case = BottleneckCase(request_name)
    model = case.model()
    expected = case.expected(tensors_of(model, "default"))
    found = model.to(DEVICE)(input_ids=BOTTLENECK_IDS.to(DEVICE)).logits
    # A Llama's rotary embedding is float32.
    exact = {"rtol": 1e-9, "atol": 1e-12} if case.kind != "llama" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), **exact)


@pytest.mark.parametrize("request_name", ["MAD-G", "MAD-G-LS"])
def test_generated_adapters_equal_the_formulas(request_name):
    case = MadGCase(request_name)
    model = case.model()
    expected = case.expected(model, "quy")
    model = model.to(DEVICE).train()
    with model.set_language("quy"):
        found = model(input_ids=BOTTLENECK_IDS.to(DEVICE)).logits
        found.square().sum().backward()
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-9, atol=1e-12)
    adapter = model.generate_adapter("quy")
    plain = adapter.add_to(case.base().to(DEVICE)).to(DEVICE).eval()
    torch.testing.assert_close(
        plain(input_ids=BOTTLENECK_IDS.to(DEVICE)).logits.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-5
    )


def moved(model: PeftModel) -> PeftModel:
    for _, _, _, delta in iter_deltas(model):
        delta.values.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_generation_unmerged_resident_and_merged_are_one(dtype):
    model = moved(get_peft_model(llama(dtype).to(DEVICE), RandConfig(density=0.2))).eval()
    before = copy.deepcopy(model.get_base_model().state_dict())
    given = {"input_ids": ids()[:, :5], "attention_mask": torch.ones_like(ids()[:, :5]), "max_new_tokens": 8}
    unmerged = model.generate(**given, do_sample=False)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**given, do_sample=False), unmerged)
    with resident(model):
        assert torch.equal(model.generate(**given, do_sample=False), unmerged)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model.merge_and_unload().generate(**given, do_sample=False), unmerged)


def test_saved_there_and_loaded_here(tmp_path):
    model = moved(get_peft_model(llama().to(DEVICE), RandConfig(density=0.1))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_same(model, loaded)
    again = PeftModel.from_pretrained(llama().to(DEVICE), tmp_path).eval()
    assert all(delta.indices.device.type == DEVICE for _, _, _, delta in iter_deltas(again))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, again(input_ids=ids()).logits)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_is_as_close_to_float64_as_a_dense_model(dtype):
    torch.manual_seed(1)
    model = get_peft_model(llama(), RandConfig(density=0.1, init_weights=False))
    dense = copy.deepcopy(model).merge_and_unload().requires_grad_()
    exact = copy.deepcopy(dense).double()
    for own in (model.to(DEVICE), dense.to(DEVICE)):
        with torch.autocast(DEVICE, dtype=dtype):
            loss = loss_of(own, ids())
        loss.backward()
    loss_of(exact, ids(device="cpu")).backward()
    for name, _, _, delta in iter_deltas(model):
        support = delta.indices.cpu().long()
        expected, plain = (twin.get_parameter(name).grad.cpu().view(-1)[support] for twin in (exact, dense))
        found = delta.values.grad.cpu()
        assert relative_error(found, expected) < 2 * relative_error(plain, expected) + 1e-3, name


@pytest.mark.parametrize(("method", "optimizer"), [("rand", "adamw"), ("ag", "sparse_adamw"), ("ma", "sm3")])
def test_fsdp2_on_one_device(method, optimizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training_cases, "make_bert", lambda **fields: make_bert(**fields).to(DEVICE))
    batch = training_cases.batch
    monkeypatch.setattr(
        training_cases, "batch", lambda *args, **fields: {k: t.to(DEVICE) for k, t in batch(*args, **fields).items()}
    )
    alone = training_cases.train_fsdp(method, optimizer)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = training_cases.train_fsdp(method, optimizer)
    finally:
        dist.destroy_process_group()
    assert sharded.keys() == alone.keys()
    for key, expected in alone.items():
        if isinstance(expected, Tensor):
            torch.testing.assert_close(sharded[key].cpu(), expected.cpu(), rtol=1e-6, atol=1e-9, msg=key)
