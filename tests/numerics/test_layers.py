"""Every kind of layer against the dense float64 oracle: outputs and all gradients, in every mode."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from peft_sparse import RandConfig, iter_deltas, resident
from peft_sparse.core.overlay import Overlay
from tests.support.oracle import dense_twin, relative_error


def conv1d_gpt2() -> nn.Module:
    layer = Conv1D(6, 8)
    nn.init.normal_(layer.bias)
    return layer


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (5, 3, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (5, 8)),
    "gpt2 conv1d": (conv1d_gpt2, (5, 3, 8)),
    "embedding": (lambda: nn.Embedding(20, 6), None),
    "embedding with padding": (lambda: nn.Embedding(20, 6, padding_idx=3), None),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(20, 6, 0, embed_scale=2.5), None),
    "layer norm": (lambda: randomised(nn.LayerNorm(8)), (5, 3, 8)),
    "llama norm": (lambda: randomised(LlamaRMSNorm(8)), (5, 3, 8)),
    "gemma norm": (lambda: randomised(Gemma3RMSNorm(8)), (5, 3, 8)),
    "t5 norm": (lambda: randomised(T5LayerNorm(8)), (5, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, padding=1), (5, 8, 4)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, stride=2), (5, 8, 7, 5)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def make(kind: str, *, dtype=torch.float32, adapters=("default",), density=0.4, device="cpu"):
    """(base, tuned, input); the tuned model's adapters are random and all active."""
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    base = Net(build()).to(device, dtype)
    model = get_peft_model(copy.deepcopy(base), config(density, 0))
    for seed, name in enumerate(adapters[1:], start=1):
        model.add_adapter(name, config(density, seed))
    model.base_model.set_adapter(list(adapters))
    x = torch.randint(0, 20, (5, 3)) if shape is None else torch.randn(shape, dtype=dtype)
    return base, model, x.to(device)


def config(density: float, seed: int) -> RandConfig:
    return RandConfig(density=density, seed=seed, target_modules="all", init_weights=False)


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and input gradient of a fixed scalar function of the output; parameter gradients stay in the model."""
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape)
    (y.double() * weights).sum().backward()
    return y.detach(), x.grad


def oracle_of(base, model, x, adapters, dtype):
    twin, leaves = dense_twin(base, model, list(adapters), dtype=dtype)
    y, x_grad = run(twin, x.to(dtype) if x.is_floating_point() else x)
    return y, x_grad, {key: leaf.grad for key, leaf in leaves.items()}


def assert_matches(base, model, x, adapters=("default",), *, dtype=torch.float32, mode=run):
    """Outputs and gradients within twice the error that the dense path has in the same dtype (STYLE: tolerances)."""
    exact = oracle_of(base, model, x, adapters, torch.float64)
    dense = oracle_of(base, model, x, adapters, dtype)
    y, x_grad = mode(model, x)

    def check(actual, exact_part, dense_part, what):
        # A few ulps can be zero by luck in the dense path; a float32 gradient of float64 weights is rounded.
        floor = 4 * max(torch.finfo(dtype).eps, torch.finfo(actual.dtype).eps)
        allowed = max(2 * relative_error(dense_part, exact_part), floor)
        assert relative_error(actual, exact_part) <= allowed, what

    check(y, exact[0], dense[0], "output")
    if x_grad is not None:
        check(x_grad, exact[1], dense[1], "input gradient")
    for adapter in adapters:
        for name, _, _, delta in iter_deltas(model, adapter):
            if not delta.count:
                continue
            at = delta.indices.long()
            expected, approximate = (part[2][adapter, name].view(-1)[at] for part in (exact, dense))
            check(delta.values.grad, expected, approximate, f"gradient of {adapter}/{name}")
            assert delta.values.grad.dtype == delta.values.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_matches_the_dense_oracle(kind, dtype):
    base, model, x = make(kind, dtype=dtype)
    assert all(d.values.dtype == torch.float32 for _, _, _, d in iter_deltas(model))
    assert_matches(base, model, x, dtype=dtype)


@pytest.mark.parametrize("kind", LAYERS)
def test_several_active_adapters_add_up(kind):
    base, model, x = make(kind, adapters=("default", "b", "c"))
    assert_matches(base, model, x, ("default", "b", "c"))


@pytest.mark.parametrize("kind", LAYERS)
def test_resident_mode_matches(kind):
    base, model, x = make(kind, adapters=("default", "b"))

    def in_block(model, x):
        with resident(model):
            return run(model, x)

    assert_matches(base, model, x, ("default", "b"), mode=in_block)
    for name, parameter in base.named_parameters():
        module, _, part = name.rpartition(".")
        assert torch.equal(getattr(model.base_model.model.get_submodule(module).base_layer, part), parameter)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("kind", ["linear", "gpt2 conv1d", "layer norm", "llama norm", "conv2d"])
def test_gradient_checkpointing(kind, is_resident, reentrant):
    base, model, x = make(kind)
    if is_resident:
        model.base_model.model.layer.num_resident = 1
    assert_matches(base, model, x, mode=lambda m, x: run(lambda t: checkpoint(m, t, use_reentrant=reentrant), x))


@pytest.mark.parametrize("kind", ["linear", "gpt2 conv1d", "embedding", "layer norm", "conv1d"])
def test_autocast(kind):
    base, model, x = make(kind)

    def autocast(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(model, x)

    exact, _, gradients = oracle_of(base, model, x, ("default",), torch.float64)
    twin, leaves = dense_twin(base, model, ["default"], dtype=torch.float32)
    dense, _ = autocast(twin, x)
    actual, _ = autocast(model, x)
    assert actual.dtype == dense.dtype
    assert relative_error(actual, exact) <= max(2 * relative_error(dense, exact), 1e-6)
    for name, _, _, delta in iter_deltas(model):
        at = delta.indices.long()
        expected, approximate = gradients["default", name].view(-1)[at], leaves["default", name].grad.view(-1)[at]
        assert relative_error(delta.values.grad, expected) <= max(2 * relative_error(approximate, expected), 1e-6)


# Each a case of the one beside it.
COMPILED_LIKE = {
    "linear without bias": "linear",
    "embedding": "embedding with padding",
    "conv1d": "conv2d",
    "gemma norm": "llama norm",
    "t5 norm": "llama norm",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in COMPILED_LIKE else []) for k in LAYERS]
)
def test_compiled(kind):
    base, model, x = make(kind, adapters=("default", "b"))
    compiled = torch.compile(model, backend="aot_eager")
    assert_matches(base, model, x, ("default", "b"), mode=lambda _, x: run(compiled, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_frozen_adapter_acts_but_gets_no_gradient(kind):
    base, model, x = make(kind, adapters=("default", "language"))
    model.set_requires_grad("language", False)
    exact, _, gradients = oracle_of(base, model, x, ("default", "language"), torch.float64)
    y, _ = run(model, x)
    assert relative_error(y, exact) < 1e-5
    for name, _, _, delta in iter_deltas(model, "language"):
        assert delta.values.grad is None, name
    for name, _, _, delta in iter_deltas(model, "default"):
        expected = gradients["default", name].view(-1)[delta.indices.long()]
        assert relative_error(delta.values.grad, expected) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_a_trainable_base_parameter_under_an_adapter_gets_its_dense_gradient(kind):
    base, model, x = make(kind)
    for parameter in model.base_model.model.layer.base_layer.parameters():
        parameter.requires_grad_()
    twin, leaves = dense_twin(base, model, ["default"], dtype=torch.float64)
    run(twin, x.double() if x.is_floating_point() else x)
    run(model, x)
    for (_, name), leaf in leaves.items():
        own = getattr(model.base_model.model.layer.base_layer, name.rpartition(".")[2])
        assert relative_error(own.grad, leaf.grad) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_and_unmerged_outputs_are_bit_equal(kind, dtype):
    _, model, x = make(kind, dtype=dtype, adapters=("default", "b"))
    with torch.no_grad():
        unmerged = model(x)
        with resident(model):
            assert torch.equal(model(x), unmerged)
        model.merge_adapter()
        assert torch.equal(model(x), unmerged)
        assert torch.equal(model.merge_and_unload()(x), unmerged)


def test_the_oracle_notices_a_wrong_sum(monkeypatch):
    """Planted bug: an overlay that forgets the last delta where supports overlap."""
    right = Overlay.entries
    monkeypatch.setattr(
        Overlay, "entries", lambda self, w, v: right(self, w, [*v[:-1], torch.zeros_like(v[-1])] if len(v) > 1 else v)
    )
    base, model, x = make("linear", adapters=("default", "b"))
    with pytest.raises(AssertionError, match="output"):
        assert_matches(base, model, x, ("default", "b"))


def test_the_oracle_notices_a_wrong_gradient():
    """Planted bug: the gradients of two weights exchanged."""
    base, model, x = make("linear")

    def exchanged(model, x):
        result = run(model, x)
        for _, _, _, delta in iter_deltas(model):
            delta.values.grad[:2] = delta.values.grad[:2].flip(0).clone()
        return result

    with pytest.raises(AssertionError, match="gradient of default"):
        assert_matches(base, model, x, mode=exchanged)


def test_training_in_resident_mode_equals_training_outside():
    losses = []
    for is_resident in (False, True):
        _, model, x = make("linear")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        history = []
        with resident(model) if is_resident else torch.enable_grad():
            for _ in range(5):
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                history.append(float(loss.detach()))
            with torch.no_grad():
                history.append(float(model(x).square().mean()))
        losses.append(history)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_an_exception_leaves_resident_mode_bit_exactly():
    base, model, x = make("linear", dtype=torch.bfloat16)

    def interrupted():
        with resident(model):
            model(x)
            assert not torch.equal(model.base_model.model.layer.base_layer.weight, base.layer.weight)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert torch.equal(model.base_model.model.layer.base_layer.weight, base.layer.weight)
