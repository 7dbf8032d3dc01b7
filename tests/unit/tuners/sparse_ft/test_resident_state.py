"""What is read, loaded, copied, moved or left half-way while deltas stand in the base weights."""

from __future__ import annotations

import copy
import gc
import io
import threading
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_model, save_model
from torch import nn

from peft_sparse import ConfigError, RandConfig, resident
from tests.support.adapters import tuned
from tests.support.models import IDS, base_weights, llama, logits


def is_pristine(state, *, prefix="base_model.model."):
    """Whether a state dict holds the weights of the base model."""
    own = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
    return all(torch.equal(own[prefix + name], tensor) for name, tensor in llama().named_parameters())


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_state_dicts_hold_the_base_model_whatever_they_are_taken_of():
    model = tuned()
    with resident(model):
        before = logits(model)
        assert not is_pristine(dict(model.named_parameters()))
        assert is_pristine(model.state_dict())
        assert torch.equal(logits(model), before)
        assert is_pristine(model.get_base_model().state_dict(), prefix="")
        logits(model)
        assert torch.equal(q_proj(model).state_dict()["base_layer.weight"], q_proj(tuned()).base_layer.weight)
        logits(model)
        kept = q_proj(model).base_layer.state_dict(keep_vars=True)["weight"]
        assert torch.equal(kept, q_proj(tuned()).base_layer.weight)
        assert kept is q_proj(model).base_layer.weight


@pytest.mark.parametrize("hold", [lambda v: v, lambda v: v.detach(), lambda v: v.data.view(-1)])
def test_a_state_dict_that_shares_memory_stays_as_it_was_taken(hold):
    model = tuned()
    with resident(model):
        logits(model)
        state = {name: hold(tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        logits(model)
        assert is_pristine(
            {name: tensor.view_as(dict(model.named_parameters())[name]) for name, tensor in state.items()}
        )
    assert is_pristine(base_weights(model), prefix="")


def test_what_is_loaded_inside_takes_the_place_of_the_base_weights():
    other = {name: tensor + 1 for name, tensor in tuned().state_dict().items() if "base_layer.weight" in name}
    model, outside = tuned(), tuned()
    outside.load_state_dict(other, strict=False)
    with resident(model):
        logits(model)
        model.load_state_dict(other, strict=False)
        assert torch.equal(logits(model), logits(outside))
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if n in other)


def test_files_of_safetensors_hold_the_base_model(tmp_path):
    model = tuned()
    with resident(model):
        want = logits(model)
        save_model(model, str(tmp_path / "model.safetensors"))
        model.get_base_model().save_pretrained(tmp_path / "base")
    fresh = tuned()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    load_model(fresh, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(fresh), want)


def test_a_copy_made_inside_is_of_the_model_outside():
    model = tuned()
    with resident(model):
        want = logits(model)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    for made in (twin, torch.load(file, weights_only=False)):
        assert is_pristine(base_weights(made), prefix="")
        assert torch.equal(logits(made), want)
        assert is_pristine(base_weights(made), prefix="")
        with resident(made):
            assert torch.equal(logits(made), want)
        assert is_pristine(base_weights(made), prefix="")


@pytest.mark.parametrize("order", ["nested", "overlapping"])
def test_the_last_block_to_be_left_restores(order):
    model = tuned()
    first, second = resident(model), resident(model)
    first.__enter__()
    second.__enter__()
    logits(model)
    for block in (second, first) if order == "nested" else (first, second):
        block.__exit__(None, None, None)
        logits(model)
    assert is_pristine(base_weights(model), prefix="")
    assert not q_proj(model).is_resident


def test_an_exception_inside_restores():
    model = tuned()

    def fail():
        with resident(model):
            logits(model)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert is_pristine(base_weights(model), prefix="")


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16).to(torch.float32), lambda m: m.half(), lambda m: m.double()]
)
@pytest.mark.parametrize("around", ["resident", "merged"])
def test_a_cast_inside_is_the_cast_of_the_base_model(move, around):
    model = tuned()
    if around == "resident":
        with resident(model):
            logits(model)
            move(model)
            logits(model)
    else:
        model.merge_adapter()
        move(model)
        model.unmerge_adapter()
    want = dict(move(llama()).named_parameters())
    assert all(torch.equal(tensor, want[name]) for name, tensor in base_weights(model).items())


def test_threads_share_the_mode():
    model, want = tuned(), logits(tuned())
    wrong = []

    def serve(i):
        for j in range(12):
            with resident(model) if (i + j) % 2 else torch.no_grad(), torch.no_grad():
                if not torch.equal(logits(model), want):
                    wrong.append((i, j))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert is_pristine(base_weights(model), prefix="")


def test_a_block_that_is_never_entered_warns():
    model = tuned()
    with pytest.warns(UserWarning, match="write `with resident"):
        resident(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with resident(model):
            pass
        gc.collect()


def test_it_decorates_functions():
    model = tuned()

    @resident(model)
    def inside():
        return q_proj(model).is_resident

    assert inside()
    assert inside()
    assert not q_proj(model).is_resident


@pytest.mark.parametrize("kind", ["sparse", "ada"])
@pytest.mark.parametrize("copied", [False, True])
def test_base_weights_are_not_loaded_under_a_merged_adapter(kind, copied):
    model = tuned(kind)
    state, want = copy.deepcopy(model.state_dict()), logits(model)
    model.merge_adapter()
    model = copy.deepcopy(model) if copied else model
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\)"):
        model.load_state_dict(state)
    model.unmerge_adapter()
    model.load_state_dict(state)
    assert torch.equal(logits(model), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("strict", [False, True, None])
def test_no_program_is_made_inside(strict, is_written):
    """It would share the weights: `torch.jit.trace` checks itself by a forward that writes the deltas into them."""
    torch.manual_seed(0)
    config = RandConfig(density=0.4, target_modules="all-linear", init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), config).eval()
    x = torch.randn(4, 6)

    def program():
        inside = model.get_base_model()
        if strict is None:
            return torch.jit.trace(inside, x)
        return torch.export.export(inside, (x,), strict=strict).module()

    with resident(model), torch.no_grad():
        if is_written:
            model(x)
        with pytest.raises(Exception, match=r"inside of resident\(model\)"):
            program()
        want = model(x)
    assert torch.allclose(program()(x), want)


def test_a_backward_after_a_merge_sees_the_weight_of_its_forward():
    model = tuned()
    states = torch.randn(2, 16, requires_grad=True)
    (want,) = torch.autograd.grad(q_proj(model)(states).square().sum(), states)
    output = q_proj(model)(states).square().sum()
    model.merge_adapter()
    (found,) = torch.autograd.grad(output, states)
    assert torch.equal(found, want)


def test_a_backward_after_the_block_sees_the_weight_of_its_forward():
    model, plain = tuned(), tuned()
    with resident(model):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if b.grad is not None)
