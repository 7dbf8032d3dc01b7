"""Weights that modules compute in each forward (weight norm, spectral norm, pruning): refused by name, never left out
in silence.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from peft_sparse import AdaSftConfig, RandConfig
from peft_sparse.errors import ConfigError


def same(state, before):
    return list(state) == list(before) and all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def old(apply):
    def quietly(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            apply(module)

    return quietly


KINDS = {
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "old weight_norm": (old(nn.utils.weight_norm), nn.utils.remove_weight_norm),
    "old spectral_norm": (old(nn.utils.spectral_norm), nn.utils.remove_spectral_norm),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
}


class Net(nn.Module):
    def __init__(self, *, bias=True):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.normed = nn.Linear(8, 8, bias=bias)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.relu(self.normed(torch.relu(self.inner(x)))))


def net(kind, **kwargs):
    torch.manual_seed(0)
    model = Net(**kwargs)
    KINDS[kind][0](model.normed)
    return model


def wav2vec(*, stable):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=10, do_stable_layer_norm=stable, feat_extract_norm="layer" if stable else "group",
        apply_spec_augment=False,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", ["all", "all-linear", ["normed"], ["inner", "normed"], ".*(inner|normed)"])
def test_is_refused_by_name_and_the_model_is_as_it_was(kind, bias, targets):
    model = net(kind, bias=bias)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"normed\.weight: computed .*exclude_modules=\['normed'\]"):
        get_peft_model(model, RandConfig(num_weights=4, target_modules=targets))
    assert same(model.state_dict(), before)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", KINDS)
def test_ada_sft_refuses_it_as_well(kind):
    with pytest.raises(ConfigError, match=r"normed\.weight: computed"):
        get_peft_model(net(kind), AdaSftConfig(target_modules="all-linear"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all", "all-linear"])
def test_both_ways_out_work(kind, targets):
    excluded = get_peft_model(net(kind), RandConfig(num_weights=4, target_modules=targets, exclude_modules=["normed"]))
    assert {name.split(".")[0] for name in excluded.peft_config["default"].counts} <= {"inner", "out"}
    model = net(kind)
    KINDS[kind][1](model.normed)
    tuned = get_peft_model(model, RandConfig(density=0.5, target_modules=targets))
    assert "normed.weight" in tuned.peft_config["default"].counts


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_beside_it_can_be_tuned(kind):
    model = net(kind).eval()
    x = torch.randn(3, 8)
    before = model(x)
    tuned = get_peft_model(model, RandConfig(num_weights=8, target_parameters=["normed.bias"])).eval()
    assert torch.equal(tuned(x), before)
    tuned(x).sum().backward()
    (delta,) = (p for p in tuned.parameters() if p.requires_grad)
    assert delta.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_tunes_it_is_refused_and_the_model_is_as_it_was(kind, tmp_path):
    get_peft_model(Net(), RandConfig(density=0.5, target_modules="all-linear")).save_pretrained(tmp_path)
    model = net(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"normed\.weight: computed"):
        PeftModel.from_pretrained(model, tmp_path)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("stable", [False, True])
def test_wav2vec_by_its_linear_layers_says_nothing_of_its_convolution(stable, caplog):
    get_peft_model(wav2vec(stable=stable), RandConfig(density=0.05))
    assert not caplog.records


@pytest.mark.parametrize("stable", [False, True])
def test_wav2vec_with_its_convolution_left_out_trains_and_loads(stable, tmp_path):
    model = wav2vec(stable=stable)
    untuned = copy.deepcopy(model)
    advice = r"pos_conv_embed\.conv\.weight: computed .*exclude_modules=\['pos_conv_embed.conv'\]"
    with pytest.raises(ConfigError, match=advice):
        get_peft_model(model, RandConfig(density=0.05, target_modules="all"))
    config = RandConfig(density=0.05, target_modules="all", exclude_modules=["pos_conv_embed.conv"])
    tuned = get_peft_model(model, config)
    x, labels = torch.randn(2, 100), torch.ones(2, 3, dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    tuned(x, labels=labels).loss.backward()
    optimizer.step()
    after = tuned(x).logits
    assert not torch.equal(after, untuned(x).logits)
    tuned.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(untuned, tmp_path)(x).logits, after)
    assert torch.equal(tuned.merge_and_unload()(x).logits, after)
