"""`support_rows`: every method's support in a share of the rows, exactly k weights, trained as any other."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_sparse import (
    ConfigError,
    DeftXConfig,
    GivenConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseConfig,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    select_by_gradients,
    start_dense_phase,
)
from peft_sparse.core.backends import products
from peft_sparse.selection.rows import num_rows, rows_of
from tests.support.oracle import dense_twin, relative_error

SHARE = 0.2
NUM_WEIGHTS = 100


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 30), nn.Linear(30, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def made(config: SparseConfig) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Small(), config)


def check(model: nn.Module, share: float = SHARE, total: int = NUM_WEIGHTS) -> dict[str, set[int]]:
    """Exactly as many weights as asked for, in no more rows than allowed; the rows of each tensor."""
    found = {}
    for name, _, _, delta in iter_deltas(model):
        found[name] = set(rows_of(delta.indices, delta.shape).tolist()) if len(delta.shape) > 1 else set()
        assert len(found[name]) <= (num_rows(share, delta.shape) or 0), name
    assert sum(delta.count for _, _, _, delta in iter_deltas(model)) == total
    return found


COMMON = {"num_weights": NUM_WEIGHTS, "support_rows": SHARE, "target_modules": ["first", "second"]}


@pytest.mark.parametrize("budget", ["uniform", "global", {"first": 0.3, "second": 0.7}], ids=str)
class TestEveryMethod:
    @pytest.mark.parametrize("config", [RandConfig, SpielAGConfig, SpielMAConfig])
    def test_by_chance(self, config, budget):
        check(made(config(**COMMON, budget=budget)))

    @pytest.mark.parametrize("criterion", ["largest_weight", "smallest_weight"])
    def test_by_the_weights(self, criterion, budget):
        model = made(OneShotConfig(**COMMON, criterion=criterion, budget=budget))
        rows = check(model)
        weight = model.base_model.model.first.base_layer.weight
        sums = weight.abs().sum(1) if criterion == "largest_weight" else -weight.abs().sum(1)
        assert rows["first.weight"] <= set(sums.topk(6).indices.tolist())

    def test_by_gradients(self, budget):
        model = made(OneShotConfig(**COMMON, criterion="fisher", selection_batches=2, budget=budget))
        select_by_gradients(model, [batch(0), batch(1)], loss_fn=loss_of)
        check(model)

    @pytest.mark.parametrize("config", [LotteryTicketConfig, DeftXConfig])
    def test_by_a_dense_phase(self, config, budget):
        model = made(config(**COMMON, budget=budget))
        phase = start_dense_phase(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss_of(model, batch()).backward()
        optimizer.step()
        phase.start_sparse_phase()
        check(model)


def train(model: nn.Module, updates: int) -> list[dict[str, set[int]]]:
    """The rows of each tensor after every update."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for update in range(updates):
        optimizer.zero_grad()
        loss_of(model, batch(update)).backward()
        optimizer.step()
        seen.append(check(model))
    return seen


class TestSpiel:
    SCHEDULE: ClassVar = {
        "reselection_steps": 3,
        "estimation_steps": 2,
        "initial_reselection_rate": 0.5,
        "total_steps": 20,
    }

    @pytest.mark.parametrize("budget", ["uniform", "global"])
    def test_ag_chooses_rows_once_and_keeps_to_them(self, budget):
        model = made(SpielAGConfig(**COMMON, **self.SCHEDULE, budget=budget, candidates_per_weight=1.5))
        drawn = check(model)
        seen = train(model, 15)
        assert seen[0] == drawn
        assert seen[1] != drawn, "the first reselection replaces everything, rows included"
        for before, after in pairwise(seen[1:]):
            for name, most in (("first.weight", 6), ("second.weight", 4)):
                # Rows that are out of use make room for others.
                assert len(after[name] - before[name]) <= most - len(before[name] & after[name])

    def test_ag_takes_the_rows_with_the_largest_gradients(self):
        model = made(SpielAGConfig(**COMMON, **self.SCHEDULE))
        torch.manual_seed(0)
        base = Small()
        loss_of(base, batch(0)).backward()
        best = set(base.first.weight.grad.abs().sum(1).topk(6).indices.tolist())
        assert train(model, 2)[1]["first.weight"] <= best

    @pytest.mark.parametrize("replace_all_first", [True, False])
    def test_ma_stays_in_the_rows_that_were_drawn(self, replace_all_first):
        model = made(SpielMAConfig(**COMMON, **self.SCHEDULE, replace_all_first=replace_all_first))
        before = {name: delta.indices.clone() for name, _, _, delta in iter_deltas(model)}
        drawn = check(model)
        seen = train(model, 12)
        assert all(rows[name] <= drawn[name] for rows in seen for name in drawn)
        assert any(not torch.equal(before[name], delta.indices) for name, _, _, delta in iter_deltas(model))

    def test_ag_without_full_replacement_stays_in_its_rows(self):
        model = made(SpielAGConfig(**COMMON, **self.SCHEDULE, replace_all_first=False))
        drawn = check(model)
        assert all(rows[name] <= drawn[name] for rows in train(model, 9) for name in drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_the_dense_oracle_and_need_the_rows_alone(dtype, monkeypatch):
    widths = []
    entries = products.entries_of_product
    monkeypatch.setattr(
        "peft_sparse.core.backends.sddmm.entries_of_product",
        lambda left, right, supports: (
            widths.append(products.layout_of(supports, (left.shape[1], right.shape[1])).num_rows)
            or entries(left, right, supports)
        ),
    )
    torch.manual_seed(0)
    base = Small().to(dtype)
    model = get_peft_model(copy.deepcopy(base), RandConfig(**COMMON, init_weights=False))
    twin, leaves = dense_twin(base, model, ["default"], dtype=torch.float64)
    x = batch().to(dtype)
    loss_of(model, x).backward()
    loss_of(twin, x.double()).backward()
    for name, _, _, delta in iter_deltas(model):
        expected = leaves["default", name].grad.view(-1)[delta.indices.long()]
        assert relative_error(delta.values.grad, expected) < (1e-5 if dtype == torch.float32 else 5e-2)
    assert sorted(widths) == [4, 6]


def test_conv1d_rows_are_inputs():
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config).eval()
    model = get_peft_model(
        copy.deepcopy(base),
        RandConfig(density=0.05, support_rows=0.25, target_modules=["c_attn"], init_weights=False),
    )
    ((name, _, _, delta),) = list(iter_deltas(model))
    assert delta.shape == (16, 48)
    assert len(set(rows_of(delta.indices, delta.shape).tolist())) <= 4
    twin, leaves = dense_twin(base, model, ["default"], dtype=torch.float64)
    ids = torch.arange(8).view(1, 8)
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    twin.eval()(input_ids=ids, labels=ids).loss.backward()
    expected = leaves["default", name].grad.view(-1)[delta.indices.long()]
    assert relative_error(delta.values.grad, expected) < 1e-4


def test_vectors_are_not_confined():
    model = made(RandConfig(density=0.1, support_rows=0.2, target_biases=True, target_modules=["first"]))
    counts = {name: delta.count for name, _, _, delta in iter_deltas(model)}
    assert counts == {"first.weight": 36, "first.bias": 3}


def test_saved_and_loaded(tmp_path):
    model = made(RandConfig(**COMMON))
    before = {name: delta.indices.clone() for name, _, _, delta in iter_deltas(model)}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Small(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].support_rows == SHARE
    for name, _, _, delta in iter_deltas(loaded):
        assert torch.equal(delta.indices, before[name])


def test_adapters_add_up_beyond_the_rows_of_one():
    model = made(RandConfig(**COMMON))
    model.add_adapter("other", RandConfig(**COMMON, seed=1))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="linear")
    assert model.peft_config["both"].support_rows is None
    model.set_adapter("both")
    rows = {name: set(rows_of(d.indices, d.shape).tolist()) for name, _, _, d in iter_deltas(model, "both")}
    assert len(rows["first.weight"]) > 6


def test_too_many_weights_for_the_rows():
    with pytest.raises(ConfigError, match=r"support_rows=0\.2 leaves room for 72 weights in first\.weight, but 180"):
        made(RandConfig(density=0.5, support_rows=0.2, target_modules=["first", "second"]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RandConfig(density=0.1, support_rows=0.0), r"support_rows must be a share .* got 0\.0"),
        (lambda: RandConfig(density=0.1, support_rows=10), r"support_rows must be a share .* got 10"),
        (lambda: GivenConfig(support={"first.weight": [1]}, support_rows=0.1), "support_rows must not be given"),
        (lambda: SparseConfig(method="fixed", density=0.1, support_rows=0.1), "support_rows must not be given"),
    ],
)
def test_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
