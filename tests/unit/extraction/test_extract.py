"""Extraction: which weights are kept, what is reported, what is refused, and what is left on disk."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_sparse import extract_adapter
from peft_sparse.checkpoints.shards import WEIGHTS
from peft_sparse.errors import ConfigError, FormatError, SelectionError
from peft_sparse.selection.denoise import denoise
from peft_sparse.selection.top_k import joint_top_k
from tests.support.checkpoints import SIZES, save, saved_deltas, tiny_bert, tiny_classifier, tiny_llama, tune

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """`base`, `tuned` (every weight moved) and `partly` (three in ten)."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_llama()
    save(base, folder / "base")
    save(tune(base), folder / "tuned", max_shard_size="4KB")
    save(tune(base, share=0.3), folder / "partly")
    return folder


def extract(saved: Path, output: Path, tuned: str = "tuned", **request):
    return extract_adapter(saved / "base", saved / tuned, output, **request)


def differences(saved: Path, tuned: str = "tuned") -> dict[str, torch.Tensor]:
    """In the order of the model."""
    base, other = (LlamaForCausalLM.from_pretrained(saved / name).state_dict() for name in ("base", tuned))
    return {name: other[name] - base[name] for name in base}


def assert_holds(folder: Path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """The adapter tunes these positions of the differences, by these differences."""
    deltas = saved_deltas(folder / ADAPTER)
    assert deltas.keys() == {name for name, indices in expected.items() if indices.numel()}
    for name, delta in deltas.items():
        assert torch.equal(delta.indices, expected[name])
        torch.testing.assert_close(delta.values, found[name].flatten()[expected[name].long()], rtol=1e-6, atol=0)


def test_the_largest_differences_of_all_tensors_are_kept(saved, tmp_path):
    result = extract(saved, tmp_path / "a", density=0.1)
    moved = differences(saved)
    count = round(0.1 * sum(d.numel() for d in moved.values()))
    assert result.total.count == count
    assert_holds(tmp_path / "a", joint_top_k({n: d.abs() for n, d in moved.items()}, count), moved)


def test_a_budget_decides_where_they_lie(saved, tmp_path):
    shares = {"embed|lm_head": 0.25, r"layers\.0": 0.5, r"layers\.1|model\.norm": 0.25}
    result = extract(saved, tmp_path / "a", num_weights=400, budget=shares)
    by_group = {kept.name: kept.count for kept in result.by_group}
    assert by_group["model.layers.0"] == 200
    assert by_group["embeddings"] + by_group["other"] == pytest.approx(100, abs=16)
    moved = differences(saved)
    uniform = extract(saved, tmp_path / "b", density=0.1, budget="uniform", target_modules="all-linear")
    assert all(abs(kept.count - 0.1 * kept.size) < 1 for kept in uniform.tensors)
    assert len(uniform.tensors) == 14
    expected = {kept.name: joint_top_k({"": moved[kept.name].abs()}, kept.count)[""] for kept in uniform.tensors}
    assert_holds(tmp_path / "b", expected, moved)


def test_denoised_differences_rank_and_plain_ones_are_kept(saved, tmp_path):
    options = {"rank": 2, "residual_density": 0.1}
    result = extract(saved, tmp_path / "a", density=0.1, criterion="denoised", **options)
    moved = differences(saved)
    scores = {name: (d if "embed" in name else denoise(d, **options)).abs() for name, d in moved.items()}
    expected = joint_top_k(scores, result.total.count)
    assert_holds(tmp_path / "a", expected, moved)
    plain = joint_top_k({n: d.abs() for n, d in moved.items()}, result.total.count)
    assert any(not torch.equal(expected[name], plain[name]) for name in plain)
    provenance = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["provenance"]
    assert (provenance["criterion"], provenance["rank"], provenance["residual_density"]) == ("denoised", 2, 0.1)


def test_what_does_not_differ_is_not_kept_whatever_denoising_gives_it(saved, tmp_path):
    extract(saved, tmp_path / "a", "partly", density=0.25, criterion="denoised", rank=1)
    moved = differences(saved, "partly")
    scores = denoise(moved["lm_head.weight"], rank=1, residual_density=0.05)
    assert bool((scores[moved["lm_head.weight"] == 0] != 0).any())
    for name, delta in saved_deltas(tmp_path / "a" / ADAPTER).items():
        assert bool((moved[name].flatten()[delta.indices.long()] != 0).all())


def test_keeping_all_residuals_ranks_as_plain_change(saved, tmp_path):
    extract(saved, tmp_path / "a", density=0.1)
    extract(saved, tmp_path / "b", density=0.1, criterion="denoised", residual_density=1.0)
    one, other = (load_file(tmp_path / name / ADAPTER) for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one.keys() == other.keys()


def test_an_equivalent_rank_counts_linear_layers(saved, tmp_path):
    result = extract(saved, tmp_path / "a", equivalent_rank=1)
    linear = [kept for kept in result.tensors if "proj" in kept.name or "lm_head" in kept.name]
    shapes = {name: d.shape for name, d in differences(saved).items()}
    assert result.total.count == sum(sum(shapes[kept.name]) for kept in linear)


def test_shares_of_the_squared_difference(saved, tmp_path):
    result = extract(saved, tmp_path / "a", "partly", density=0.1)
    moved = differences(saved, "partly")
    deltas = saved_deltas(tmp_path / "a" / ADAPTER)
    kept = {name: delta.to_dense().double().square().sum() for name, delta in deltas.items()}
    squared = {name: d.double().square().sum() for name, d in moved.items()}
    assert result.total.squared == pytest.approx(float(sum(squared.values())), rel=1e-6)
    assert result.total.share_kept == pytest.approx(float(sum(kept.values()) / sum(squared.values())), rel=1e-6)
    assert 0.3 < result.total.share_kept < 1
    assert result.total.differing == sum(int((d != 0).sum()) for d in moved.values())
    in_layer = [name for name in moved if name.startswith("model.layers.1.")]
    layer = next(kept for kept in result.by_group if kept.name == "model.layers.1")
    assert layer.squared_kept == pytest.approx(float(sum(kept.get(name, 0) for name in in_layer)), rel=1e-6)
    assert [part.name for part in result.by_part] == ["embeddings", "attention", "feed-forward", "norm", "other"]
    attention = next(part for part in result.by_part if part.name == "attention")
    assert attention.squared == pytest.approx(float(sum(s for n, s in squared.items() if "attn" in n)), rel=1e-6)
    for rows in (result.by_group, result.by_part):
        assert sum(row.count for row in rows) == result.total.count
    assert json.loads(json.dumps(result.to_dict()))["total"]["share_kept"] == result.total.share_kept


def test_more_than_differ_is_refused_with_their_number(saved, tmp_path):
    differing = sum(int((d != 0).sum()) for d in differences(saved, "partly").values())
    with pytest.raises(SelectionError, match=rf"only {differing} of \d+ differ between base and tuned.*'changed'"):
        extract(saved, tmp_path / "a", "partly", density=0.5)
    assert not (tmp_path / "a").exists()
    assert extract(saved, tmp_path / "a", "partly", num_weights=differing).total.count == differing


def test_nothing_to_keep(saved, tmp_path):
    with pytest.raises(SelectionError, match="do not differ in any targeted weight"):
        extract_adapter(saved / "base", saved / "base", tmp_path / "a", num_weights="changed")
    with pytest.raises(SelectionError, match="but only 0 of"):
        extract_adapter(saved / "base", saved / "base", tmp_path / "a", density=0.1)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "give exactly one of density, num_weights and equivalent_rank, got none"),
        ({"density": 0.1, "num_weights": "changed"}, "exactly one of density"),
        ({"density": 2}, r"density must be in \(0, 1\], got 2"),
        ({"density": 0.1, "criterion": "best"}, r"criterion must be one of \['change', 'denoised'\], got 'best'"),
        ({"density": 0.1, "criterion": "denoised", "rank": 0.0}, "rank must be"),
        ({"density": 0.1, "budget": "most"}, "budget must be"),
        ({"num_weights": "changed", "budget": "uniform"}, "leaves no budget; got 'uniform'"),
        ({"density": 0.1, "values_dtype": "int8"}, "values_dtype must be one of"),
        ({"density": 0.1, "target_modules": ["nowhere"]}, "not found in the base model"),
        ({"num_weights": 10**9}, "asks for 1000000000 weights, but the targeted tensors hold"),
    ],
)
def test_requests_that_cannot_be_met(saved, tmp_path, request_, message):
    with pytest.raises(ConfigError, match=message):
        extract(saved, tmp_path / "a", **request_)
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_output_is_only_replaced_on_request(saved, tmp_path):
    output = tmp_path / "a"
    extract(saved, output, density=0.1)
    (output / "notes.txt").write_text("mine")
    card = output / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    before = (output / ADAPTER).read_bytes()
    with pytest.raises(ConfigError, match=r"exists and is not empty.*--overwrite"):
        extract(saved, output, density=0.2)
    assert (output / ADAPTER).read_bytes() == before
    # A failure half-way leaves the old adapter as it was.
    with pytest.raises(SelectionError):
        extract(saved, output, "partly", density=0.9, overwrite=True)
    assert (output / ADAPTER).read_bytes() == before
    extract(saved, output, density=0.2, overwrite=True)
    assert (output / ADAPTER).read_bytes() != before
    assert json.loads((output / "adapter_config.json").read_text())["density"] == 0.2
    assert "My own words." in card.read_text()
    assert "0.2 of the weights" in card.read_text()
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        ADAPTER,
        "notes.txt",
    ]


def test_the_output_cannot_be_a_file(saved, tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        extract(saved, tmp_path / "a", density=0.1)


def test_failed_writing_leaves_nothing(saved, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("peft_sparse.checkpoints.output.save_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        extract(saved, tmp_path / "a", density=0.1)
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_is_refused_tensor_by_tensor(saved, tmp_path):
    other = tiny_llama(intermediate_size=32)
    save(other, tmp_path / "wide")
    with pytest.raises(FormatError) as caught:
        extract_adapter(saved / "base", tmp_path / "wide", tmp_path / "a", density=0.1)
    text = str(caught.value)
    assert "6 of 21 parameters do not match. Nothing was written." in text
    assert "model.layers.0.mlp.gate_proj.weight: [24, 16] in " in text
    assert "model.layers.1.mlp.down_proj.weight: " in text
    assert not (tmp_path / "a").exists()


def test_a_long_list_of_mismatches_is_cut(tmp_path, saved):
    save(tiny_bert(), tmp_path / "bert")
    with pytest.raises(FormatError, match=r"no floating-point tensor in (.|\n)*and 27 more$") as caught:
        extract_adapter(saved / "base", tmp_path / "bert", tmp_path / "a", density=0.1)
    assert str(caught.value).count("\n  ") == 11


def test_more_layers_are_no_head(saved, tmp_path):
    save(tiny_llama(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(FormatError, match=r"layers.2.self_attn.q_proj.weight: no floating-point tensor in .*base"):
        extract_adapter(saved / "base", tmp_path / "deep", tmp_path / "a", density=0.1)


def test_a_longer_vocabulary_is_refused_with_the_way_out(saved, tmp_path):
    save(tiny_llama(vocab_size=31), tmp_path / "long")
    with pytest.raises(FormatError, match=r"resize_token_embeddings(.|\n)*embed_tokens.weight: \[30, 16\] in"):
        extract_adapter(saved / "base", tmp_path / "long", tmp_path / "a", density=0.1)


def test_a_tuned_checkpoint_that_lacks_a_tensor(saved, tmp_path):
    shutil.copytree(saved / "base", tmp_path / "short")
    tensors = load_file(tmp_path / "short" / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "short" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"1 of 21 (.|\n)*fused experts(.|\n)*norm.weight: no floating-point .*short"):
        extract_adapter(saved / "base", tmp_path / "short", tmp_path / "a", density=0.1)


def test_a_classifier_with_other_labels_is_a_head_of_its_own(tmp_path):
    base, classifier = tiny_classifier(num_labels=2), tiny_classifier(num_labels=3)
    classifier.bert.load_state_dict(base.bert.state_dict())
    save(base, tmp_path / "base")
    save(tune(classifier), tmp_path / "tuned")
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", density=0.1)
    assert result.heads == ("classifier",)
    tensors = load_file(tmp_path / "a" / ADAPTER)
    assert tensors["base_model.model.classifier.weight"].shape == (3, 16)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_quantised_checkpoints_are_refused(saved, tmp_path, side):
    shutil.copytree(saved / "base", tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    pair = (tmp_path / "packed", saved / "tuned") if side == "base" else (saved / "base", tmp_path / "packed")
    with pytest.raises(FormatError, match=r"packed is quantised \(bitsandbytes\).*model.dequantize\(\)"):
        extract_adapter(*pair, tmp_path / "a", density=0.1)


def test_pickled_checkpoints_are_refused(saved, tmp_path):
    shutil.copytree(saved / "base", tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pickled ones.*save_pretrained"):
        extract_adapter(saved / "base", tmp_path / "pickled", tmp_path / "a", density=0.1)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_training_is_refused(saved, tmp_path, broken):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = broken
    save(model, tmp_path / "diverged")
    with pytest.raises(FormatError, match=r"diverged: tensor 'model.layers.1.mlp.up_proj.weight' holds 1 values"):
        extract_adapter(saved / "base", tmp_path / "diverged", tmp_path / "a", density=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: {}, "has no config.json"),
        (
            lambda config: {**config, "architectures": ["TheirOwn"]},
            "'TheirOwn', which is none of transformers'",
        ),
        (lambda config: {**config, "architectures": None}, "names the architecture None"),
    ],
)
def test_a_config_that_builds_nothing(saved, tmp_path, change, message):
    shutil.copytree(saved / "base", tmp_path / "odd")
    path = tmp_path / "odd" / "config.json"
    config = change(json.loads(path.read_text()))
    path.write_text(json.dumps(config)) if config else path.unlink()
    with pytest.raises(FormatError, match=message):
        extract_adapter(saved / "base", tmp_path / "odd", tmp_path / "a", density=0.1)


def test_integer_buffers_are_no_weights(saved, tmp_path):
    for name in ("base", "tuned"):
        shutil.copytree(saved / "base", tmp_path / name)
        path = tmp_path / name / WEIGHTS
        tensors = load_file(path)
        tensors["model.position_ids"] = torch.arange(5) + (name == "tuned")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + (name == "tuned")
        save_file(tensors, path, metadata={"format": "pt"})
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", num_weights="changed")
    assert {kept.name for kept in result.tensors if kept.count} == {"model.norm.weight"}


def test_integers_in_the_place_of_weights_are_refused(saved, tmp_path):
    shutil.copytree(saved / "base", tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "packed" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model.norm.weight: no floating-point tensor in .*packed"):
        extract_adapter(saved / "base", tmp_path / "packed", tmp_path / "a", density=0.1)


def test_what_no_adapter_can_hold_is_named(tmp_path, caplog):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name != "vocab_size"}
    base = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    tuned = copy.deepcopy(base)
    tuned.embeddings.cls_token.data += 2.0
    tuned.layernorm.weight.data += 0.5
    save(base, tmp_path / "base")
    save(tuned, tmp_path / "tuned")
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", num_weights="changed")
    assert result.left_out == {"embeddings.cls_token": pytest.approx(4.0 * 16)}
    assert "1 parameters differ that no sparse adapter can hold" in caplog.text
    assert {kept.name for kept in result.tensors if kept.count} == {"layernorm.weight"}


def test_tensors_are_read_one_at_a_time(saved, tmp_path, monkeypatch):
    """No two differences are alive at once, and each is made once for the ranking."""
    import weakref

    from peft_sparse.extraction.sources import CheckpointPair

    alive: list[weakref.ref] = []
    asked: list[str] = []
    plain = CheckpointPair.difference

    def watched(self, name):
        assert all(ref() is None for ref in alive[:-1])
        found = plain(self, name)
        alive.append(weakref.ref(found))
        asked.append(name)
        return found

    monkeypatch.setattr(CheckpointPair, "difference", watched)
    result = extract(saved, tmp_path / "a", density=0.1)
    assert asked == [kept.name for kept in result.tensors]


def test_the_config_names_the_revision(saved, tmp_path):
    snapshot = tmp_path / "snapshots" / "abc123"
    shutil.copytree(saved / "base", snapshot)
    extract_adapter(snapshot, saved / "tuned", tmp_path / "a", density=0.1)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["revision"] == "abc123"


def test_models_without_a_common_class_name_still_match(tmp_path):
    # The head's class does not matter, only its tensors do.
    base = tiny_llama()
    save(base.model, tmp_path / "bare")
    tuned = tune(base)
    save(tuned, tmp_path / "tuned")
    result = extract_adapter(tmp_path / "bare", tmp_path / "tuned", tmp_path / "a", density=0.1)
    assert result.heads == ("lm_head",)
    assert "lm_head.weight" not in {kept.name for kept in result.tensors}


@pytest.mark.parametrize("targets", [None, "all"])
def test_target_norms_false_leaves_norms_out(saved, tmp_path, targets):
    extract(saved, tmp_path / "with", density=1.0, target_modules=targets)
    extract(saved, tmp_path / "without", density=1.0, target_modules=targets, target_norms=False)
    with_norms, without = (set(saved_deltas(tmp_path / name / ADAPTER)) for name in ("with", "without"))
    assert with_norms - without == {name for name in with_norms if "norm" in name}
    assert any("norm" in name for name in with_norms)
