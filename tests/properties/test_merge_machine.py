"""Whatever is done to adapters, in whatever order: outputs are the dense model's, and base weights stay bit-exact."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_sparse import RandConfig, iter_deltas, resident
from tests.support.laws import examples

TOKENS = torch.tensor([[0, 3, 6], [2, 2, 5]])
TARGETS = {
    "everything": {"target_modules": "all"},
    "linear": {"target_modules": ["first", "second"], "target_biases": True},
    "second": {"target_modules": ["second"]},
    "rest": {"target_modules": ["tokens", "norm"], "target_biases": True},
}
# No shrinking: a step takes milliseconds, and the message names the steps.
SETTINGS = settings(
    examples(24),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Net(nn.Module):
    """One of each: an embedding, a norm, a linear layer, and transformers' transposed one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 8)
        self.second = Conv1D(5, 8)
        nn.init.normal_(self.second.weight)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.norm(self.tokens(tokens)))))


def bits(tensor: Tensor) -> list[int]:
    """The memory of a tensor: unlike `==`, tells -0.0 from 0.0 and holds for NaN."""
    return tensor.detach().contiguous().view(torch.uint8).flatten().tolist()


class Adapters(RuleBasedStateMachine):
    """Drives a PeftModel and, beside it, a plain account of what ought to be the case."""

    dtype = torch.float32

    @initialize(seed=st.integers(0, 3), where=st.sampled_from(sorted(TARGETS)))
    def start(self, seed: int, where: str) -> None:
        base = Net(self.dtype)
        self.before = {name: p.detach().clone() for name, p in base.named_parameters()}
        self.model = get_peft_model(base, self.config(seed, where), adapter_name="a0").eval()
        # Own account: {adapter: {parameter: (indices, values)}}, copied so that no shared memory agrees with itself.
        self.supports = {"a0": self.read("a0")}
        self.active, self.merged, self.disabled, self.added = ["a0"], [], False, 1

    def config(self, seed: int, where: str) -> RandConfig:
        return RandConfig(density=0.4, seed=seed, init_weights=False, **TARGETS[where])

    def read(self, adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
        found = {
            n: (d.indices.long().clone(), d.values.detach().clone()) for n, _, _, d in iter_deltas(self.model, adapter)
        }
        assert found
        return found

    def names(self) -> list[str]:
        return list(self.supports)

    # ---- what can be done --------------------------------------------------------------------------------------------

    # As everywhere in PEFT, layers that an adapter added while others are disabled brings along are not disabled.
    @precondition(lambda self: len(self.supports) < 4 and not self.disabled)
    @rule(seed=st.integers(0, 3), where=st.sampled_from(sorted(TARGETS)))
    def add(self, seed: int, where: str) -> None:
        name = f"a{self.added}"
        self.added += 1
        with quiet():
            self.model.add_adapter(name, self.config(seed, where))
        self.supports[name] = self.read(name)
        # PEFT activates the old adapters anew, which unmerges them.
        self.merged = []

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.names()), min_size=1, unique=True))
        with quiet():
            self.model.base_model.set_adapter(names)
        self.active, self.merged = names, []

    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data: st.DataObject, safe: bool) -> None:
        some = data.draw(st.none() | st.lists(st.sampled_from(self.names()), min_size=1, unique=True))
        with quiet():
            self.model.merge_adapter(adapter_names=some, safe_merge=safe)
        self.merged += [name for name in (self.active if some is None else some) if name not in self.merged]

    @rule()
    def unmerge(self) -> None:
        with quiet():
            self.model.unmerge_adapter()
        self.merged = []

    @rule(disabled=st.booleans())
    def switch(self, disabled: bool) -> None:
        with quiet():
            (
                self.model.base_model.disable_adapter_layers
                if disabled
                else self.model.base_model.enable_adapter_layers
            )()
        self.disabled = disabled

    @precondition(lambda self: not self.merged and len(self.supports) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names()))
        with quiet():
            self.model.delete_adapter(name)
        del self.supports[name]
        self.active = [active for active in self.active if active != name] or self.names()[:1]
        assert self.model.active_adapters == self.active
        if self.model.active_adapter == name:
            # PeftModel believes in one active adapter; with several it forgets to let go of a deleted one.
            self.model.active_adapter = self.active[0]

    @precondition(lambda self: self.merged)
    @rule()
    def delete_a_merged_one(self) -> None:
        with pytest.raises(ValueError, match="while they are merged"):
            self.model.delete_adapter(self.merged[0])

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    def train(self, data: st.DataObject, scale: float) -> None:
        name = data.draw(st.sampled_from(self.names()))
        torch.manual_seed(data.draw(st.integers(0, 9)))
        for _, _, _, delta in iter_deltas(self.model, name):
            delta.values.data.copy_(torch.randn(delta.count) * scale)
        self.supports[name] = self.read(name)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def reselect(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names()))
        torch.manual_seed(data.draw(st.integers(0, 9)))
        for _, _, _, delta in iter_deltas(self.model, name):
            chosen = torch.randperm(delta.numel)[: delta.count].sort().values
            delta.set_support(chosen.to(delta.indices.dtype), torch.randn(delta.count))
        self.supports[name] = self.read(name)

    @precondition(lambda self: not self.merged)
    @rule(fails=st.booleans())
    def use_resident(self, fails: bool) -> None:
        expected = self.expected_output()
        try:
            with resident(self.model):
                assert torch.equal(self.model(TOKENS), expected)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails

    @precondition(lambda self: not self.disabled)
    @rule()
    def disable_for_a_while(self) -> None:
        with quiet(), self.model.disable_adapter():
            assert torch.equal(self.model(TOKENS), self.dense({}))
        # PEFT unmerges as soon as a disabled model runs.
        self.merged = []

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def weights(self, *, merged_only: bool) -> dict[str, Tensor]:
        """Each parameter with the deltas in it that act on it: summed in float32, in order, rounded once.

        As everywhere in PEFT, a layer in which something is merged computes with that alone, the others with the active
        adapters.
        """
        result = {}
        for name, own in self.before.items():
            layer = name.rpartition(".")[0] + "."
            here = [a for a in self.merged if any(parameter.startswith(layer) for parameter in self.supports[a])]
            acting = here if here or merged_only else self.active
            deltas = [self.supports[adapter][name] for adapter in acting if name in self.supports[adapter]]
            total = torch.zeros(own.numel())
            touched = torch.zeros(own.numel(), dtype=torch.bool)
            for indices, values in deltas:
                total[indices] += values
                touched[indices] = True
            flat = own.flatten()
            result[name] = torch.where(touched, (flat.float() + total).to(own.dtype), flat).view(own.shape)
        return result

    def dense(self, changed: dict[str, Tensor]) -> Tensor:
        net = Net(self.dtype)
        net.load_state_dict({**self.before, **changed})
        with torch.no_grad():
            return net(TOKENS)

    def expected_output(self) -> Tensor:
        return self.dense({} if self.disabled else self.weights(merged_only=False))

    @invariant()
    def base_weights_are_exact(self) -> None:
        expected = self.weights(merged_only=True) if self.merged else self.before
        found = base_parameters(self.model)
        assert found.keys() == expected.keys()
        wrong = [name for name, tensor in expected.items() if bits(found[name]) != bits(tensor)]
        assert not wrong, f"{wrong} differ with {self.merged} merged"

    @invariant()
    def outputs_are_the_dense_models(self) -> None:
        expected = self.expected_output()
        with quiet(), torch.no_grad():
            found = self.model(TOKENS)
        if self.disabled:
            self.merged = []
        assert torch.equal(found, expected), f"{(found - expected).abs().max()} off"

    @invariant()
    def values_are_what_was_set(self) -> None:
        for name, parameters in self.supports.items():
            for parameter, (indices, values) in self.read(name).items():
                assert torch.equal(indices, parameters[parameter][0])
                assert bits(values) == bits(parameters[parameter][1])


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base model's parameters under the names they had before PEFT came."""
    own = {}
    for name, parameter in model.base_model.model.named_parameters():
        if "sparse_ft_" not in name:
            own[name.replace(".base_layer", "")] = parameter
    return own


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about merging twice, unmerging nothing and switching while merged: all of it is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_in_any_order(dtype):
    machine = type("AdaptersIn" + str(dtype).rpartition(".")[2], (Adapters,), {"dtype": dtype})
    run_state_machine_as_test(machine, settings=SETTINGS)


def drifting_restore(layer: BaseTunerLayer, parameter: str | None = None) -> None:
    """What PEFT's other tuners do: subtract the delta instead of putting the originals back."""
    for name in list(layer._written):
        if parameter in (None, name):
            base = getattr(layer.get_base_layer(), name).data.view(-1)
            for delta in layer.active_deltas(name, list(layer.deltas_of(name))):
                if delta.count and math.isfinite(float(delta.values.sum())):
                    base[delta.indices.long()] -= delta.values.detach().to(base.dtype)
            del layer._written[name]


def test_the_machine_notices_subtracting_instead_of_restoring(monkeypatch):
    from peft_sparse.tuners.sparse_ft.layers.base import SparseLayer

    monkeypatch.setattr(SparseLayer, "restore", drifting_restore)
    machine = type("Drifting", (Adapters,), {"dtype": torch.bfloat16})
    with pytest.raises(AssertionError, match="differ with"):
        run_state_machine_as_test(machine, settings=SETTINGS)
