"""Adapters of RoSA: the two parts, columns beyond 15 bits, masks, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import GivenConfig, import_adapter, import_mask
from peft_sparse.checkpoints.adapter_files import read_adapter
from peft_sparse.errors import ConfigError, FormatError
from tests.support.foreign_files import bert, write_peft

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
WIDE = 40_000
SETTINGS = {"peft_type": "ROSA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6, "d": 0.1, "bias": "none"}


def llama(intermediate: int = 24):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=intermediate, **sizes)).eval()


def rows_of(dense: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Compressed rows, columns in 16 bits with a sign that they have not, and what is stored for kernels."""
    rows, columns = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1), torch.bincount(rows, minlength=len(dense)).cumsum(0)])
    return {
        "values": dense[rows, columns].to(dtype),
        "row_offs": offsets.to(torch.int32),
        "row_idx": torch.arange(len(dense)).to(torch.int16),
        "col_idx": columns.to(torch.int32).to(torch.int16),
        "tr_perm": torch.arange(len(rows), dtype=torch.int32),
    }


def sparse(shape, count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.zeros(shape)
    where = torch.randperm(dense.numel(), generator=generator)[:count]
    dense.view(-1)[where] = torch.randn(count, generator=generator).to(torch.bfloat16).float()
    return dense


def content(dense: dict[str, Tensor], low_rank: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    found = {f"{m}.rosa_spa.{part}": t for m, d in dense.items() for part, t in rows_of(d).items()}
    for module, (a, b) in low_rank.items():
        found |= {f"{module}.rosa_A.weight": a, f"{module}.rosa_B.weight": b}
    return found


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def settings(base, **changes):
    return {**SETTINGS, "base_model_name_or_path": str(base), **changes}


def parts(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    dense = {Q: sparse((16, 16), 20), DOWN: sparse((16, 24), 30, seed=1)}
    low_rank = {
        Q: (torch.randn(3, 16, generator=generator), torch.randn(16, 3, generator=generator)),
        DOWN: (torch.randn(3, 24, generator=generator), torch.randn(16, 3, generator=generator)),
    }
    return dense, low_rank


@pytest.mark.parametrize("pickled", [False, True])
def test_the_two_parts_add_up_to_rosas_sum(tmp_path, base, pickled):
    dense, low_rank = parts()
    write_peft(tmp_path / "rosa", settings(base), content(dense, low_rank), pickle=pickled)
    imported = import_adapter(tmp_path / "rosa", tmp_path / "out")
    assert (imported.kind, imported.num_weights) == ("rosa", 50)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lora", "sparse"]
    original = dict(llama().named_parameters())
    found = dict(PeftModel.from_pretrained(llama(), imported.sparse).merge_and_unload().named_parameters())
    for name, weight in original.items():
        expected = weight + dense[name[: -len(".weight")]] if name[: -len(".weight")] in dense else weight
        assert torch.equal(found[name], expected), name
    both = PeftModel.from_pretrained(llama(), imported.sparse).merge_and_unload()
    both = PeftModel.from_pretrained(both, imported.lora).merge_and_unload()
    for module, (a, b) in low_rank.items():
        expected = original[f"{module}.weight"] + dense[module] + 2 * (b @ a)
        assert torch.allclose(both.get_parameter(f"{module}.weight"), expected, atol=1e-5)
    config = json.loads((tmp_path / "out" / "sparse" / "adapter_config.json").read_text())
    assert config["provenance"]["settings"]["d"] == 0.1
    assert config["provenance"]["format"] == "rosa"
    assert (config["values_dtype"], config["base_model_name_or_path"]) == ("bfloat16", str(base))


def test_columns_beyond_fifteen_bits(tmp_path):
    model = llama(WIDE)
    model.save_pretrained(tmp_path / "base")
    dense = torch.zeros(16, WIDE)
    for row, column in [(0, 0), (0, 32_767), (3, 32_768), (3, 39_999), (15, 35_000)]:
        dense[row, column] = row + 1
    stored = content({DOWN: dense}, {})
    assert int(stored[f"{DOWN}.rosa_spa.col_idx"].min()) < 0
    write_peft(tmp_path / "rosa", settings(tmp_path / "base", r=0), stored)
    imported = import_adapter(tmp_path / "rosa", tmp_path / "out")
    assert imported.lora is None
    assert torch.equal(read_adapter(imported.sparse).deltas[f"{DOWN}.weight"].to_dense(), dense.bfloat16())


def test_more_columns_than_sixteen_bits_are_refused(tmp_path):
    a, b = torch.zeros(1, 70_000), torch.zeros(16, 1)
    stored = content({DOWN: sparse((16, 24), 3)}, {DOWN: (a, b)})
    write_peft(tmp_path / "rosa", settings("some/base"), stored)
    with pytest.raises(FormatError, match=r"has 70000 columns, and RoSA stores them in 16 bits"):
        import_adapter(tmp_path / "rosa", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_low_rank_part_tells_the_shapes_where_the_base_cannot_be_had(tmp_path):
    dense, low_rank = parts()
    write_peft(tmp_path / "rosa", settings("some/base"), content(dense, low_rank))
    imported = import_adapter(tmp_path / "rosa", tmp_path / "out")
    assert torch.equal(read_adapter(imported.sparse).deltas[f"{DOWN}.weight"].to_dense().float(), dense[DOWN])
    write_peft(tmp_path / "alone", settings("some/base", r=0), content(dense, {}))
    with pytest.raises(ConfigError, match=r"does not say how many columns .* has.*--base"):
        import_adapter(tmp_path / "alone", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_low_rank_alone_and_masks_that_were_never_set(tmp_path, base):
    dense, low_rank = parts()
    unset = {module: torch.zeros_like(d) for module, d in dense.items()}
    stored = content(unset, low_rank)
    stored[f"{Q}.rosa_spa.values"] = torch.ones(9)  # allocated, and never pointed at
    stored[f"{Q}.rosa_spa.col_idx"] = torch.zeros(9, dtype=torch.int16)
    write_peft(tmp_path / "rosa", settings(base), stored)
    imported = import_adapter(tmp_path / "rosa", tmp_path / "out")
    assert (imported.sparse, imported.num_weights) == (None, 0)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lora"]
    write_peft(tmp_path / "nothing", settings(base, r=0), content(unset, {}))
    with pytest.raises(FormatError, match=r"has neither a low-rank part nor a mask"):
        import_adapter(tmp_path / "nothing", tmp_path / "out2")


def test_scaling_patterns_and_rank_stabilisation_are_handed_on(tmp_path, base):
    _, low_rank = parts()
    config = settings(base, use_rslora=True, alpha_pattern={"down_proj": 12})
    write_peft(tmp_path / "rosa", config, content({}, low_rank))
    imported = import_adapter(tmp_path / "rosa", tmp_path / "out")
    merged = PeftModel.from_pretrained(llama(), imported.lora).merge_and_unload()
    for module, alpha in {Q: 6, DOWN: 12}.items():
        a, b = low_rank[module]
        expected = llama().get_parameter(f"{module}.weight") + alpha / 3**0.5 * (b @ a)
        assert torch.allclose(merged.get_parameter(f"{module}.weight"), expected, atol=1e-4)


def test_embeddings(tmp_path, base):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 30, generator=generator), torch.randn(16, 3, generator=generator)
    dense = sparse((30, 16), 40)
    name = "model.embed_tokens"
    stored = content({name: dense}, {}) | {f"{name}.rosa_embedding_A": a, f"{name}.rosa_embedding_B": b}
    write_peft(tmp_path / "rosa", settings(base), stored)
    imported = import_adapter(tmp_path / "rosa", tmp_path / "out")
    model = PeftModel.from_pretrained(llama(), imported.sparse).merge_and_unload()
    model = PeftModel.from_pretrained(model, imported.lora).merge_and_unload()
    expected = llama().model.embed_tokens.weight + dense + 2 * (b @ a).T
    assert torch.allclose(model.model.embed_tokens.weight, expected, atol=1e-5)


def test_masks_as_supports(tmp_path):
    mask = sparse((16, 16), 20) != 0
    torch.save({f"base_model.model.{Q}": mask}, tmp_path / "mask.pt")
    support = import_mask(tmp_path / "mask.pt")
    assert list(support) == [f"{Q}.weight"]
    assert torch.equal(support[f"{Q}.weight"], mask.flatten().nonzero().squeeze(1))
    model = get_peft_model(llama(), GivenConfig(support=support))
    assert model.peft_config["default"].counts == {f"{Q}.weight": 20}
    torch.save({Q: mask.float()}, tmp_path / "mask.pt")
    with pytest.raises(FormatError, match=r"must be a mask of bools, got torch.float32"):
        import_mask(tmp_path / "mask.pt")
    torch.save({Q: print}, tmp_path / "mask.pt")
    with pytest.raises(FormatError, match=r"names __builtin__.print"):
        import_mask(tmp_path / "mask.pt")


def changed(name: str, tensor: Tensor | None):
    stored = content(*parts())
    if tensor is None:
        del stored[name]
    else:
        stored[name] = tensor
    return stored


SPA = f"{Q}.rosa_spa"


@pytest.mark.parametrize(
    ("stored", "changes", "message"),
    [
        (content(*parts()), {"bias": "all"}, r"has trained biases \(bias='all'\)"),
        (content(*parts()), {"fan_in_fan_out": True}, r"has fan_in_fan_out=True and a sparse part"),
        (changed(f"{SPA}.row_offs", None), {}, r"lacks \['row_offs'\] of .*q_proj"),
        (changed(f"{Q}.rosa_A.weight", None), {}, r"holds only \['B.weight'\] of the low-rank part of .*q_proj"),
        (changed(f"{SPA}.row_offs", torch.arange(18)), {}, r"row_offs must hold 17 numbers"),
        (changed(f"{SPA}.row_offs", torch.full((17,), 20)), {}, r"row_offs must rise from 0 to the 20 values"),
        (changed(f"{SPA}.row_offs", torch.tensor([0, 9, *[5] * 14, 20])), {}, r"row_offs must rise from 0"),
        (changed(f"{SPA}.row_offs", torch.tensor([0, *[5] * 15, 21])), {}, r"row_offs must rise from 0 to the 20"),
        (changed(f"{SPA}.col_idx", torch.full((20,), -1, dtype=torch.int16)), {}, r"in \[0, 16\), got 65535 to 65535"),
        (changed(f"{SPA}.col_idx", torch.zeros(20, dtype=torch.int16)), {}, r"a position is there twice"),
        (changed(f"{SPA}.col_idx", torch.zeros(19, dtype=torch.int16)), {}, r"one value for each column"),
        (changed(f"{SPA}.col_idx", torch.zeros(20)), {}, r"col_idx must be whole numbers"),
        (changed(f"{SPA}.values", torch.full((20,), float("nan"))), {}, r"20 values are NaN or infinite"),
        (changed(f"{Q}.rosa_A.other.weight", torch.ones(2)), {}, r"rosa_A.other.weight', which is not part of RoSA's"),
        (
            changed(f"{Q}.rosa_A.weight", torch.ones(3, 15)),
            {},
            r"q_proj has shape \[16, 15\] in the adapter",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, base, stored, changes, message):
    write_peft(tmp_path / "rosa", settings(base, **changes), stored)
    with pytest.raises(FormatError, match=message):
        import_adapter(tmp_path / "rosa", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "rosa"]


def test_another_base_is_refused_by_name(tmp_path, base):
    write_peft(tmp_path / "rosa", settings(base), content(*parts()))
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(FormatError, match=r"(?s)does not belong to .*bert"):
        import_adapter(tmp_path / "rosa", tmp_path / "out", base=tmp_path / "bert")


def test_an_earlier_import_is_replaced_whole(tmp_path, base):
    dense, low_rank = parts()
    write_peft(tmp_path / "rosa", settings(base), content(dense, low_rank))
    import_adapter(tmp_path / "rosa", tmp_path / "out")
    write_peft(tmp_path / "other", settings(base, r=0), content(dense, {}))
    with pytest.raises(ConfigError, match=r"exists and is not empty"):
        import_adapter(tmp_path / "other", tmp_path / "out")
    import_adapter(tmp_path / "other", tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["sparse"]
