"""Bottleneck adapters: the config, starting values, generated weights, averages, files, heads and hosts."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import BertForSequenceClassification, BertForTokenClassification

from peft_sparse import (
    BottleneckConfig,
    BottleneckWeights,
    ConfigError,
    FormatError,
    bottleneck_weights,
    generated_weights,
    iter_bottlenecks,
    set_bottleneck_weights,
)
from peft_sparse.tuners.bottleneck.adapter import Bottleneck, init_linears
from peft_sparse.tuners.bottleneck.invertible import COUPLINGS
from tests.support.bottleneck import Case, fill, parameters_of, tensors_of
from tests.support.exact import IDS, close, logits
from tests.support.models import bert

pytestmark = pytest.mark.filterwarnings("ignore")
BERT = Case("pfeiffer on post-norm")


# ---- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "pfeifer"}, r"kind must be one of \['pfeiffer', 'houlsby', 'parallel'\], got 'pfeifer'"),
        ({"init": "zeros"}, "init must be one of"),
        ({"placement": "somewhere"}, "placement must be one of"),
        ({"placement": "norm"}, "placement='norm' needs target_modules"),
        ({"invertible": "realnvp"}, "invertible must be one of"),
        ({"bottleneck_size": 4, "reduction_factor": 4}, "say the same thing: give one of them, got 4 and 4"),
        ({"bottleneck_size": 0}, "bottleneck_size must be a whole number >= 1, got 0"),
        ({"bottleneck_size": 2.5}, "bottleneck_size must be a whole number"),
        ({"reduction_factor": 0}, "reduction_factor must be a finite number > 0, got 0"),
        ({"invertible_reduction_factor": float("inf")}, "invertible_reduction_factor must be a finite number"),
        ({"activation": "relux"}, "activation must be one of .*'relu'.* got 'relux'"),
        ({"scaling": "channel"}, "scaling must be a finite number or 'learned', got 'channel'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a valid regular expression"),
    ],
)
def test_a_value_that_no_run_can_honour_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "size"),
    [({}, 48), ({"reduction_factor": 2}, 384), ({"reduction_factor": 7}, 109), ({"bottleneck_size": 384}, 384)],
)
def test_sizes_at_mberts_width(fields, size):
    config = BottleneckConfig(**fields)
    assert config.size_for(768) == size
    module = Bottleneck(768, size)
    assert sum(p.numel() for p in module.parameters()) == 2 * 768 * size + 768 + size


def test_a_width_smaller_than_the_factor_leaves_one():
    assert BottleneckConfig().size_for(8) == 1


# ---- starting values -------------------------------------------------------------------------------------------------


def test_near_identity():
    torch.manual_seed(0)
    module = Bottleneck(400, 200)
    init_linears(module.down, module.up, init="near_identity")
    for linear in (module.down, module.up):
        assert linear.bias.abs().max() == 0
        assert linear.weight.abs().max() <= 0.02
        # A normal distribution cut off at two deviations has 0.88 of the deviation.
        assert linear.weight.std().item() == pytest.approx(0.0088, rel=0.02)
    x = torch.randn(50, 400)
    assert module(x).abs().max() < 0.1
    assert module(x).abs().max() > 0


@pytest.mark.parametrize("invertible", [None, "nice", "glow"])
def test_identity_is_exact(invertible):
    model = get_peft_model(BERT.base(), BottleneckConfig(init="identity", invertible=invertible)).eval()
    close(logits(model), logits(BERT.base()))
    for _, module in iter_bottlenecks(model):
        assert module.down.weight.abs().sum() > 0
        assert module.up.weight.abs().sum() == 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_in_training_alone(dropout):
    model = get_peft_model(BERT.base(), BERT.config(dropout=dropout))
    assert torch.equal(logits(model.eval()), logits(model.eval()))
    model.train()
    assert torch.equal(logits(model), logits(model)) is (dropout == 0.0)


# ---- invertible adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 7, 8, 33])
@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_are_inverted(name, width):
    torch.manual_seed(0)
    coupling = COUPLINGS[name](width, activation="gelu", reduction_factor=2, device=None).double()
    coupling.reset(init="near_identity", random=True)
    x = torch.randn(3, 5, width, dtype=torch.float64) * 4
    y = coupling(x)
    assert (y - x).abs().max() > 0.05
    torch.testing.assert_close(coupling.inverse(y), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(coupling(coupling.inverse(x)), x, rtol=1e-9, atol=1e-9)
    # Both halves are changed, and each entry by entries of its own example and token alone.
    assert bool(((y - x).abs().amax((0, 1)) > 0).all())
    torch.testing.assert_close(coupling(x[1:2, 3:4]), y[1:2, 3:4])
    y.sum().backward()
    assert all(p.grad is not None for p in coupling.parameters())


def test_parameters_of_a_coupling():
    # MAD-X, with halves of 384: two networks 384 -> 192 -> 384, biases too.
    coupling = COUPLINGS["nice"](768, activation="relu", reduction_factor=2, device=torch.device("meta"))
    assert sum(p.numel() for p in coupling.parameters()) == 2 * (384 * 192 + 192 + 192 * 384 + 384)


def test_the_inverse_stays_with_the_models_head_while_it_is_trained_whole():
    case = Case("pfeiffer with nice")
    model = get_peft_model(case.base(), case.config(modules_to_save=["decoder"]), autocast_adapter_dtype=False).eval()
    fill(model, "default", 0)
    close(logits(model), case.expected(tensors_of(model, "default")))
    model.add_adapter("second", case.config(modules_to_save=["decoder"]), autocast_adapter_dtype=False)
    fill(model, "second", 1)
    close(logits(model), case.expected(tensors_of(model, "default")))
    model.set_adapter("second")
    close(logits(model.eval()), case.expected(tensors_of(model, "second")))
    close(logits(model.merge_and_unload()), logits_of_second(case))


def logits_of_second(case: Case) -> torch.Tensor:
    model = case.model("x")
    fill(model, "x", 1)
    return case.expected(tensors_of(model, "x"))


# ---- weights from tensors --------------------------------------------------------------------------------------------


def test_weights_are_set_from_tensors():
    model, other = BERT.model("a", "b"), BERT.model("a", "b")
    weights = {path: BottleneckWeights(*map(torch.clone, w)) for path, w in bottleneck_weights(model, "b").items()}
    assert list(weights) == [f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)]
    set_bottleneck_weights(other, weights, "a")
    close(logits(other), BERT.expected(tensors_of(model, "b")))
    before = tensors_of(other, "a")
    bad = {path: w._replace(up_bias=torch.zeros(3)) if ".1." in path else w for path, w in weights.items()}
    with pytest.raises(ConfigError, match=r"up_bias must be of shape \[8\], got \[3\]"):
        set_bottleneck_weights(other, bad, "a")
    with pytest.raises(ConfigError, match=r"exactly the sites of adapter 'a': missing \['bert.*unknown \['x'\]"):
        set_bottleneck_weights(other, {"x": weights["bert.encoder.layer.0.output.LayerNorm"]}, "a")
    now = tensors_of(other, "a")
    assert all(torch.equal(now[p][n], before[p][n]) for p in now for n in now[p])


@pytest.mark.parametrize("request_", ["pfeiffer on post-norm", "pfeiffer on pre-norm", "houlsby"])
def test_generated_weights(request_):
    case = Case(request_)
    model = case.model("a", "b")
    own = logits(model)
    parts = [tensors_of(model, name) for name in "ab"]
    generated = {
        path: BottleneckWeights(*(tensor.detach().clone().requires_grad_() for tensor in weights))
        for path, weights in bottleneck_weights(model, "b").items()
    }
    with generated_weights(model, generated, "a"):
        part = {
            path: {**parts[1][path], **({"scaling": t["scaling"]} if "scaling" in t else {})}
            for path, t in parts[0].items()
        }
        close(logits(model), case.expected(part))
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for w in generated.values() for t in w)
    assert all(p.grad is None for n, p in parameters_of(model, "a") if not n.endswith("scaling"))
    assert torch.equal(logits(model), own)


def test_generated_weights_of_each_example():
    model = BERT.model("a", "b")
    a, b = bottleneck_weights(model, "a"), bottleneck_weights(model, "b")
    mixed = {
        path: BottleneckWeights(*(torch.stack([y, x, y]) for x, y in zip(a[path], b[path], strict=True))) for path in a
    }
    rows = (BERT.expected(tensors_of(model, "b")), BERT.expected(tensors_of(model, "a")))
    with generated_weights(model, mixed, "a"):
        close(logits(model), torch.stack([rows[0][0], rows[1][1], rows[0][2]]))


# ---- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "message"),
    [
        (["a", "x"], [1, 1], {}, r"adapters must name adapters of this model, got \['a', 'x'\]"),
        (["a"], [1, 1], {}, "one number per adapter, got 2 for 1"),
        (["a", "b"], [1, -1], {}, r"finite sum other than zero, got \[1, -1\]"),
        (["a", "b"], [1, 1], {"adapter_name": "a"}, "adapter_name 'a' is taken"),
        (["a", "b"], [1, 1], {"combination_type": "ties"}, 'combination_type must be "linear"'),
        (
            ["a", "wide"],
            [1, 1],
            {},
            r"equal shape can be averaged: 'a' and 'wide' differ at .*down.bias \(\(3,\) and",
        ),
        (["a", "tanh"], [1, 1], {}, "same activation can be averaged, got a: 'relu', tanh: 'tanh'"),
        (["a", "one"], [1, 1], {}, "equal shape can be averaged: 'a' and 'one' differ"),
    ],
)
def test_averages_that_are_none(adapters, weights, options, message):
    model = BERT.model("a", "b")
    model.add_adapter("wide", BERT.config(bottleneck_size=5))
    model.add_adapter("tanh", BERT.config(activation="tanh"))
    model.add_adapter("one", BERT.config(leave_out=[1]))
    before = set(model.peft_config)
    with pytest.raises(ConfigError, match=message):
        model.base_model.add_weighted_adapter(adapters, weights, **{"adapter_name": "new", **options})
    assert set(model.base_model.peft_config) == before


def test_an_average_takes_the_named_head():
    base = bert(BertForSequenceClassification, num_hidden_layers=1)
    model = get_peft_model(base, BottleneckConfig(task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", BottleneckConfig(task_type="SEQ_CLS"))
    for name in "ab":
        base.classifier.modules_to_save[name].weight.data.normal_()
    with pytest.raises(ConfigError, match=r"\['a', 'b'\] all have heads"):
        model.base_model.add_weighted_adapter(["a", "b"], [1, 1], "mean")
    model.base_model.add_weighted_adapter(["a", "b"], [1, 1], "mean", head_from="b")
    heads = base.classifier.modules_to_save
    assert torch.equal(heads["mean"].weight, heads["b"].weight)
    assert not any(p.requires_grad for _, p in parameters_of(model, "mean"))


# ---- files and heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.popitem(), "it lacks 1 tensors, base_model.model.bert.encoder.layer"),
        (
            lambda t: t.update({k: v[:1] for k, v in t.items() if "down.weight" in k}),
            r"is of shape \[1, 8\] where \[3, 8\]",
        ),
        (
            lambda t: t.update({"base_model.model.bert.pooler.bottleneck_adapters.down.weight": torch.ones(1)}),
            "it has 1 tensors too many",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_as_a_whole(change, message, tmp_path):
    BERT.model().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    base = BERT.base()
    before = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    with pytest.raises(FormatError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == before
    model = BERT.model("good")
    expected = logits(model)
    with pytest.raises(FormatError, match=message):
        model.load_adapter(tmp_path, adapter_name="bad")
    assert list(model.peft_config) == ["good"]
    assert torch.equal(logits(model), expected)
    # An adapter that has been trained is not thrown away because a file for it is damaged.
    with pytest.raises(FormatError, match=message):
        model.load_adapter(tmp_path, adapter_name="good")
    assert torch.equal(logits(model), expected)


def test_the_saved_config_says_where_the_modules_stand(tmp_path):
    case = Case("pfeiffer with nice")
    case.model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["placement"]) == ("BOTTLENECK", "norm")
    assert config["target_modules"] == r"(.*\.)?(layer\.\d+\.output\.LayerNorm)"
    assert config["invertible_module"] == r"(.*\.)?(embeddings\.dropout)"
    card = (tmp_path / "README.md").read_text()
    assert "Kind: `pfeiffer`, bottleneck size 3, activation `relu`" in card
    assert "bottleneck-adapter" in card


@pytest.mark.parametrize("name", ["down", "up", "adapters", "default", "x.y".replace(".", "_")])
def test_names_of_adapters(name, tmp_path):
    model = BERT.model(name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(BERT.base(), folder, adapter_name=name, autocast_adapter_dtype=False).eval()
    close(logits(loaded), BERT.expected(tensors_of(model, name)))


def test_heads_are_trained_saved_and_baked(tmp_path):
    base = bert(BertForTokenClassification, num_hidden_layers=1, vocab_size=23)
    original = copy.deepcopy(base)
    config = BottleneckConfig(task_type="TOKEN_CLS", init_weights=False)
    model = get_peft_model(base, config).eval()
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    assert config.modules_to_save in (None, ["classifier", "score"])
    model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    baked = loaded.merge_and_unload()
    assert type(baked.classifier) is torch.nn.Linear
    assert torch.equal(logits(baked), expected)


# ---- hosts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("request_", ["pfeiffer with nice", "pfeiffer on pre-norm"])
def test_fsdp_in_one_process(request_, one_process):
    case = Case(request_)
    plain = case.model()
    wrapped = FullyShardedDataParallel(copy.deepcopy(plain), use_orig_params=True, device_id=torch.device("cpu"))
    found, wanted = (model(input_ids=IDS, labels=IDS) for model in (wrapped, plain))
    close(found.logits, wanted.logits)
    for output in (found, wanted):
        output.loss.backward()
    gradients = {n.replace("_fsdp_wrapped_module.", ""): p.grad for n, p in wrapped.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            close(gradients[name].view(-1), parameter.grad.view(-1))


def test_adapters_of_different_kinds_in_one_model():
    case = Case("pfeiffer on pre-norm")
    model = case.model("language")
    model.add_adapter("task", case.config(kind="houlsby", scaling=1.0), autocast_adapter_dtype=False)
    model.add_adapter("beside", case.config(kind="parallel", scaling=1.0), autocast_adapter_dtype=False)
    for number, name in enumerate(("task", "beside"), 1):
        fill(model, name, number)
    language = tensors_of(model, "language")
    close(logits(model), case.expected(language))
    model.set_adapter("task")
    task = logits(model)
    model.base_model.set_adapter(["language", "task", "beside"])
    together = logits(model)
    assert (together - task).abs().max() > 1e-3
    baked = copy.deepcopy(model).merge_and_unload()
    close(logits(baked), together)
    model.delete_adapter("task")
    model.delete_adapter("beside")
    close(logits(model), case.expected(language))
