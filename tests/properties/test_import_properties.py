"""Laws of import and export: differences of any shape and dtype come over bit for bit, there and back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse import export_adapter, import_adapter
from peft_sparse.checkpoints.adapter_files import read_adapter
from peft_sparse.core.overlay import Overlay
from peft_sparse.importing.gap_lists import encode_gap_list
from peft_sparse.importing.restricted_pickle import integers

NAMES = st.lists(st.sampled_from(["bert", "layer", "0", "é"]), min_size=1, max_size=3).map(".".join)
PARAMETERS = st.tuples(NAMES, st.sampled_from(["weight", "bias"])).map(".".join)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def differences(draw) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)))
    dense = torch.zeros(shape, dtype=draw(DTYPES))
    chosen = draw(st.sets(st.integers(0, max(dense.numel() - 1, 0)), max_size=dense.numel()))
    for position in chosen:
        dense.view(-1)[position] = draw(st.floats(-100, 100).filter(lambda value: value == 0 or abs(value) > 1e-3))
    return dense


def foreign(difference: torch.Tensor, gap_type: type) -> dict:
    """As the format is described, by loops over every position."""
    steps, values, last = [], [], 0
    column_major = [
        (sum(i * int(np.prod(difference.shape[:d], dtype=int)) for d, i in enumerate(index)), index)
        for index in np.ndindex(tuple(difference.shape))
    ]
    for flat, index in sorted(column_major):
        if difference[index] != 0:
            steps.append(gap_type(flat - last) if not steps else flat - last)
            values.append(difference[index])
            last = flat
    stacked = torch.stack(values) if values else torch.empty(0, dtype=difference.dtype)
    return {"size": difference.size(), "index_steps": steps, "values": stacked}


@given(st.dictionaries(PARAMETERS, differences(), max_size=3), st.sampled_from([int, np.int64]), st.data())
def test_what_is_written_is_what_is_imported_and_what_is_exported(dense, gap_type, data):
    changed = {name: d for name, d in dense.items() if d.count_nonzero()}
    heads = {"classifier.weight": torch.randn(2, 3)} if data.draw(st.booleans()) else {}
    if not changed:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "sft").mkdir()
        content = {"diffs": {name: foreign(d, gap_type) for name, d in dense.items()}, "abs": heads}
        torch.save(content, root / "sft" / "pytorch_diff.bin")
        import_adapter(root / "sft", root / "a", base="some/base")
        found = read_adapter(root / "a")
        assert found.deltas.keys() == changed.keys()
        for name, difference in changed.items():
            delta = found.deltas[name]
            wide = getattr(torch, found.config["values_dtype"])
            assert delta.shape == tuple(difference.shape)
            assert torch.equal(delta.to_dense(), difference.to(wide))
            assert delta.count == int(difference.count_nonzero())
            base = torch.randn(difference.shape, dtype=torch.float64).to(wide)
            merged = Overlay([delta.indices]).add(base.clone(), [delta.values])
            assert torch.equal(merged, base + difference.to(wide))
        export_adapter(root / "a", root / "out")
        again = torch.load(root / "out" / "pytorch_diff.bin", weights_only=True)
        for name in changed:
            assert again["diffs"][name]["index_steps"] == [int(step) for step in content["diffs"][name]["index_steps"]]
            assert torch.equal(again["diffs"][name]["values"], content["diffs"][name]["values"].to(wide))
        import_adapter(root / "out", root / "b", base="some/base")
        assert read_adapter(root / "b").digest == found.digest


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=6, unique=True), st.integers(1, 3))
def test_positions_survive_the_change_of_order(positions, dimensions):
    from peft_sparse.core.delta import SparseDelta
    from peft_sparse.importing.gap_lists import decode_gap_list

    shape = {1: (2**21,), 2: (2**9, 2**12), 3: (2**7, 3, 2**13)}[dimensions]
    delta = SparseDelta(torch.tensor(sorted(positions), dtype=torch.int32), torch.randn(len(positions)), shape)
    gaps, values = encode_gap_list(delta)
    again = decode_gap_list(integers(gaps), values, shape, name="it")
    assert torch.equal(again.indices, delta.indices)
    assert torch.equal(again.values, delta.values)
