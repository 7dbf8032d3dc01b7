"""AdamW with an age per weight."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_sparse.errors import ConfigError
from peft_sparse.optim import sparse_adamw
from peft_sparse.optim.sm3 import SM3
from peft_sparse.optim.sparse_adamw import SparseAdamW

SIZES = [(5,), (300,), (7, 11), (), (0,), (64, 3, 2)]
HYPERPARAMETERS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3},
    {"maximize": True},
]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make_individual(optimizer: SparseAdamW) -> None:
    """Give every weight of the vectors, as values are, its own copy of its tensor's age."""
    for p in optimizer.param_groups[0]["params"]:
        if p.dim() == 1:
            optimizer.state[p]["age"] = optimizer.state[p]["age"].expand(p.shape).clone()


def by_hand(m: float, v: float, age: int, g: float, *, lr: float, betas: tuple[float, float], eps: float) -> float:
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    return -lr * (m / (1 - betas[0] ** (age + 1))) / ((v / (1 - betas[1] ** (age + 1))) ** 0.5 + eps)


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_shared_ages_it_is_torch_bit_for_bit(
    dtype: torch.dtype, hyperparameters: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    sparse = SparseAdamW(ours, **hyperparameters)
    dense = torch.optim.AdamW(theirs, **{kernel: True, "weight_decay": 0.0, **hyperparameters})
    if kernel == "foreach":
        monkeypatch.setattr(SparseAdamW, "_takes_fused", lambda self, part: False)
    for step in range(20):
        for params, optimizer in ((ours, sparse), (theirs, dense)):
            set_gradients(params, step)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
def test_with_equal_individual_ages_it_is_torch_within_rounding(hyperparameters: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    sparse = SparseAdamW(ours, **hyperparameters)
    dense = torch.optim.AdamW(theirs, **{"weight_decay": 0.0, **hyperparameters})
    for step in range(20):
        before = [p.detach().clone() for p in ours]
        for params, optimizer in ((ours, sparse), (theirs, dense)):
            set_gradients(params, step)
            optimizer.step()
        if step == 0:
            make_individual(sparse)
        for old, a, b in zip(before, ours, theirs, strict=True):
            torch.testing.assert_close(a - old, b - old, rtol=2e-5, atol=3e-7)
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a)
    assert all(int(sparse.state[p]["age"].max()) == 20 for p in ours if p.numel())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.9, 0.999999)])
def test_every_weight_is_corrected_by_its_own_age(betas: tuple[float, float]) -> None:
    ages = [0, 1, 4, 5, 100, 20_000, 1_000_000]
    p = nn.Parameter(torch.zeros(len(ages), dtype=torch.float64))
    optimizer = SparseAdamW([p], lr=0.5, betas=betas, eps=1e-3)
    m, v, g = (torch.rand(len(ages), dtype=torch.float64) for _ in range(3))
    state = {"age": torch.tensor(ages, dtype=torch.int32), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[p] = state
    p.grad = g
    optimizer.step()
    expected = [
        by_hand(float(m[i]), float(v[i]), age, float(g[i]), lr=0.5, betas=betas, eps=1e-3) for i, age in enumerate(ages)
    ]
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert state["age"].tolist() == [age + 1 for age in ages]


def test_young_weights_are_corrected_to_the_last_digits_in_float32() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = SparseAdamW([p], lr=1.0, eps=0.0)
    ages = [0, 1, 5]
    optimizer.state[p] = {
        "age": torch.tensor(ages, dtype=torch.int32),
        "exp_avg": torch.tensor([1 - 0.9**a for a in ages]),
        "exp_avg_sq": torch.tensor([1 - 0.999**a for a in ages]),
    }
    p.grad = torch.ones(3)
    optimizer.step()
    # Gradients of one have come all along, so every weight makes a step of the learning rate.
    torch.testing.assert_close(p.detach(), -torch.ones(3), rtol=5e-7, atol=0)


def test_ages_advance_in_bfloat16() -> None:
    # Five gradients of one with lr 1e-3 move a weight by 5e-3, whatever its dtype.
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = SparseAdamW([p], lr=1e-3)
    for step in range(5):
        p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 1:
            make_individual(optimizer)
    assert optimizer.state[p]["age"].tolist() == [5, 5, 5, 5]
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(p.detach().float(), torch.full((4,), -5e-3), rtol=5e-3, atol=0)


def test_a_low_precision_step_is_rounded_once() -> None:
    p, exact = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)), nn.Parameter(torch.ones(1000))
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for parameter in (p, exact):
        optimizer = SparseAdamW([parameter], lr=0.01, weight_decay=0.1)
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    assert torch.equal(p.detach(), exact.detach().bfloat16())


def test_parameters_without_gradient_do_not_age() -> None:
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = SparseAdamW([p, q])
    p.grad = torch.ones(3)
    optimizer.step()
    q.grad = torch.ones(3)
    optimizer.step()
    assert (int(optimizer.state[p]["age"]), int(optimizer.state[q]["age"])) == (2, 1)


def test_weight_decay_is_decoupled() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = SparseAdamW([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == pytest.approx(2 * (1 - 0.1 * 0.5))


def test_closure_and_groups() -> None:
    p, q = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    optimizer = SparseAdamW([{"params": [p], "lr": 0.5}, {"params": [q], "eps": 1.0}], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        (3 * p + 3 * q).sum().backward()
        return 42.0

    assert optimizer.step(closure) == 42.0
    assert p.item() == pytest.approx(0.5)
    assert q.item() == pytest.approx(1 - 0.1 * 3 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("individual", [False, True])
def test_a_loaded_state_goes_on_bit_for_bit(dtype: torch.dtype, individual: bool) -> None:
    params = parameters(dtype=dtype)
    optimizer = SparseAdamW(params, lr=0.01)
    for step in range(300):  # ages that bfloat16 cannot hold
        set_gradients(params[:1] if step else params, step)
        optimizer.step()
    if individual:
        make_individual(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = copy.deepcopy(params)
    loaded = SparseAdamW(twins, lr=9.0)
    loaded.load_state_dict(torch.load(file))
    for a, b in zip(params, twins, strict=True):
        for key, value in optimizer.state[a].items():
            assert loaded.state[b][key].dtype == value.dtype
            assert torch.equal(loaded.state[b][key], value), key
    for ps, o in ((params, optimizer), (twins, loaded)):
        set_gradients(ps, 999)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_a_loaded_state_is_a_copy_and_hooks_of_others_are_heard() -> None:
    p, q = (nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2))
    optimizer, loaded = SparseAdamW([p]), SparseAdamW([q])
    p.grad = torch.ones_like(p)
    optimizer.step()

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"] *= 2
        return state_dict

    loaded.register_load_state_dict_pre_hook(double)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[q]["exp_avg"], optimizer.state[p]["exp_avg"] * 2)
    loaded.state[q]["exp_avg_sq"].fill_(7)
    assert float(optimizer.state[p]["exp_avg_sq"].max()) < 1


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS)
def test_a_state_of_torchs_adamw_goes_on_bit_for_bit(
    hyperparameters: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params, fused=True, **{"weight_decay": 0.0, **hyperparameters})
    for step in range(5):
        set_gradients(params[1:] if step == 3 else params, step)
        theirs.step()
    twins = copy.deepcopy(params)
    ours = SparseAdamW(twins, lr=9.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert caplog.text.count("SparseAdamW goes on from a state of AdamW") == 1
    assert ours.state[twins[0]]["age"].dtype == torch.int32
    assert ours.state[twins[0]].keys() == {"age", "exp_avg", "exp_avg_sq"}
    for step in range(5, 10):
        for ps, optimizer in ((params, theirs), (twins, ours)):
            set_gradients(ps, step)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True)), step
    # Saved again it is a state of its own, which nobody has to take over.
    caplog.clear()
    again = SparseAdamW(copy.deepcopy(twins))
    again.load_state_dict(ours.state_dict())
    assert not caplog.text


def other_states() -> dict[str, tuple[str, Any]]:
    """{case: who wrote it, an optimizer that did}."""
    p = [nn.Parameter(torch.ones(4))]
    return {
        "SM3": ("SM3", SM3(p)),
        "AdamW with maxima": ("AdamW", torch.optim.AdamW(p, amsgrad=True)),
        "Adam, decay in its moments": ("AdamW", torch.optim.Adam(p, weight_decay=0.1)),
        "RAdam": ("AdamW", torch.optim.RAdam(p)),
        "SGD": ("SGD", torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        "Adagrad": (r"another optimizer, with \['step', 'sum'\]", torch.optim.Adagrad(p)),
        "SGD that keeps nothing": (r"another optimizer, with \['dampening'", torch.optim.SGD(p, lr=0.1)),
    }


@pytest.mark.parametrize("case", other_states())
def test_other_states_are_refused_and_change_nothing(case: str) -> None:
    writer, wrote = other_states()[case]
    wrote.param_groups[0]["params"][0].grad = torch.ones(4)
    wrote.step()
    p = nn.Parameter(torch.zeros(4))
    optimizer = SparseAdamW([p], lr=0.5)
    p.grad = torch.ones(4)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match=f"was written by {writer}.*, and this run's is SparseAdamW"):
        optimizer.load_state_dict(wrote.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())


def test_many_small_tensors_are_split_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[list[Tensor]] = []
    for limit in (1, 8, 2**16):
        monkeypatch.setitem(sparse_adamw._GROUP, "cpu", limit)
        params = parameters()
        optimizer = SparseAdamW(params)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
            make_individual(optimizer)
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps must be >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be >= 0, got nan"),
    ],
)
def test_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAdamW(parameters(), **wrong)


def test_sparse_layout_gradients_are_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.zeros(3).to_sparse()
    with pytest.raises(ValueError, match=r"got a torch\.sparse gradient"):
        SparseAdamW([p]).step()
