"""Properties of the adapter file: any deltas come back as they were, however the dictionary is ordered."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from peft_sparse.checkpoints import native
from peft_sparse.core.delta import SparseDelta

NAMES = st.lists(st.sampled_from("abcdé"), min_size=1, max_size=3).map(".".join)
PARAMETERS = st.tuples(NAMES, st.sampled_from(["weight", "bias"])).map(".".join)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def deltas(draw) -> SparseDelta:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    numel = int(torch.tensor(shape).prod())
    indices = sorted(draw(st.sets(st.integers(0, numel - 1), max_size=numel)))
    values = draw(st.lists(st.floats(-1000, 1000), min_size=len(indices), max_size=len(indices)))
    return SparseDelta(torch.tensor(indices, dtype=torch.int32), torch.tensor(values).to(draw(DTYPES)), shape)


@given(st.dictionaries(PARAMETERS, deltas(), max_size=4), st.dictionaries(NAMES, DTYPES, max_size=3), st.randoms())
def test_round_trip(adapter: dict[str, SparseDelta], heads: dict[str, torch.dtype], rng: random.Random):
    adapter_heads = {f"{name}.head": torch.arange(3.0).to(dtype) for name, dtype in heads.items()}
    tensors = native.build(adapter, adapter_heads)
    keys = list(tensors)
    rng.shuffle(keys)
    stored = load(save({key: tensors[key] for key in keys}))
    counts = {name: delta.count for name, delta in adapter.items()}
    shapes = {name: delta.shape for name, delta in adapter.items()}
    found = native.verify(stored, counts=counts, shapes=shapes, heads=dict.fromkeys(adapter_heads, (3,)), extras=())
    assert found.keys() == adapter.keys()
    for name, delta in adapter.items():
        assert torch.equal(found[name].indices, delta.indices)
        assert torch.equal(found[name].values, delta.values)
        assert found[name].values.dtype == delta.values.dtype
        assert found[name].shape == delta.shape
    again = native.finish(stored)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


@given(st.dictionaries(PARAMETERS, deltas(), min_size=1, max_size=3), st.data())
def test_every_flipped_bit_is_found(adapter: dict[str, SparseDelta], data: st.DataObject):
    tensors = native.build(adapter)
    key = data.draw(st.sampled_from(sorted(key for key in tensors if tensors[key].numel())))
    damaged = tensors[key].clone()
    flat = damaged.view(-1).view(torch.uint8)
    flat[data.draw(st.integers(0, len(flat) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        native.verify({**tensors, key: damaged})
    except native.FormatError:
        return
    raise AssertionError(f"a flipped bit in {key} was not found")
