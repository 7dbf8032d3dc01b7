"""What a small file claims is checked before memory is taken for it, and a file is decoded once."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import BottleneckConfig, ConfigError, FormatError, MadGConfig, RandConfig, iter_deltas
from peft_sparse.checkpoints import native
from peft_sparse.core import gaps
from tests.support.keys import CONFIGS, llama

MADG = {"typology": {"eng": torch.ones(5)}, "language": "eng", "bottleneck_size": 4, "language_dim": 3}


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize(
    ("config", "claim"),
    [
        (BottleneckConfig(bottleneck_size=4), {"bottleneck_size": 10**9}),
        (BottleneckConfig(reduction_factor=4), {"reduction_factor": 1e-320}),
        (BottleneckConfig(bottleneck_size=4, invertible="glow"), {"invertible_reduction_factor": 1e-9}),
        (MadGConfig(**MADG), {"language_dim": 10**9}),
        (MadGConfig(**MADG), {"layer_dim": 10**9}),
        (RandConfig(density=0.1), {"counts": 10**8}),
    ],
)
def test_sizes_in_a_config_are_checked_first(tmp_path, config, claim, has_weights):
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    if "counts" in claim:
        claim = {"counts": dict.fromkeys(content["counts"], claim["counts"])}
    file.write_text(json.dumps({**content, **claim}))
    if not has_weights:
        (tmp_path / native.SOURCE).unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    base = llama()
    with pytest.raises((ConfigError, FormatError), match=r"claim|ask for an adapter|counts"):
        PeftModel.from_pretrained(base, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    assert not any("Layer" in type(m).__name__ and hasattr(m, "base_layer") for m in base.modules())


def test_a_tensor_that_repeats_its_bytes_is_refused():
    tensors = native.build({"a.weight": RandDelta})
    key = next(key for key in tensors if key.endswith("values"))
    tensors[key] = torch.zeros(1).expand(10**9)
    with pytest.raises(FormatError, match="claims the shape"):
        native.verify(tensors)


RandDelta = next(d.delta for _, _, _, d in iter_deltas(get_peft_model(llama(), CONFIGS["sparse"]()), "default"))


def test_loading_decodes_its_own_file_once_and_encodes_nothing(tmp_path, monkeypatch):
    get_peft_model(llama(), CONFIGS["sparse"]()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    model.load_adapter(tmp_path, "second")
    seen = []
    decode, encode = gaps._decode_payload, gaps._best_parameter
    monkeypatch.setattr(gaps, "_decode_payload", lambda *a: (seen.append("decoded"), decode(*a))[1])
    monkeypatch.setattr(gaps, "_best_parameter", lambda *a: (seen.append("encoded"), encode(*a))[1])
    model.load_adapter(tmp_path, "third")
    assert seen == ["decoded"] * len(list(iter_deltas(model, "third")))
    for (_, _, _, one), (_, _, _, other) in zip(iter_deltas(model, "second"), iter_deltas(model, "third"), strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.values, other.values)
