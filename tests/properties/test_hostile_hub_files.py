"""Files of AdapterHub's format, made to hurt: refused by an error of ours, at once, executing and touching nothing."""

from __future__ import annotations

import pickle

import pytest
import torch

from peft_sparse import load_adapter_hub
from peft_sparse.errors import SparseError
from tests.support.adapter_hub import bert, write_hub
from tests.support.hostile import (
    ADVICE,
    Change,
    Executed,
    device,
    every,
    expanded,
    fifo,
    first,
    little_time_and_memory,
    on_config,
    on_tensors,
    raw,
    setting,
    zip_bomb,
)

pytestmark = pytest.mark.filterwarnings("ignore")

HUB: dict[str, Change] = {
    "config: no file": lambda folder: (folder / "adapter_config.json").unlink(),
    "config: cut off": raw("adapter_config.json", b'{"config": {'),
    "config: empty": raw("adapter_config.json", b""),
    "config: a list": raw("adapter_config.json", b"[1]"),
    "config: not UTF-8": raw("adapter_config.json", b'{"name": "\xff\xfe"}'),
    "config: deep": raw("adapter_config.json", b'{"config":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "config: large": raw("adapter_config.json", b" " * 2**25),
    "config: a long number": raw("adapter_config.json", b'{"config": ' + b"1" * 5000 + b"}"),
    "config: a pipe": fifo("adapter_config.json"),
    "config: a device": device("adapter_config.json"),
    "config: text": on_config(lambda config: {**config, "config": "pfeiffer"}),
    "config: no name": on_config(lambda config: {**config, "name": None}),
    "config: a name that is a list": on_config(lambda config: {**config, "name": ["qu"]}),
    "config: another name": on_config(lambda config: {**config, "name": "other"}),
    "config: one of PEFT's": on_config(lambda config: {**config, "peft_type": "LORA"}),
    "config: RoSA's": on_config(lambda config: {"peft_type": "ROSA"}),
    "field: activation": setting(non_linearity="none such"),
    "field: activation of another type": setting(non_linearity=["relu"]),
    "field: scaling": setting(scaling="channel"),
    "field: scaling is not finite": setting(scaling=float("inf")),
    "field: scaling beyond floats": setting(scaling=10**400),
    "field: dropout": setting(dropout="much"),
    "field: dropout of one": setting(dropout=1.5),
    "field: leave_out": setting(leave_out="all"),
    "field: leave_out is no layer": setting(leave_out=[99]),
    "field: leave_out of nothing": setting(leave_out=[None, {}]),
    "field: leave_out beyond integers": setting(leave_out=[10**40]),
    "field: reduction_factor": setting(reduction_factor=2),
    "field: reduction_factor of a millionth": setting(reduction_factor=1e-9),
    "field: reduction_factor of next to nothing": setting(reduction_factor=5e-324),
    "field: mh_adapter without tensors": setting(mh_adapter=True),
    "field: no output_adapter": setting(output_adapter=False),
    "field: cross_adapter without tensors": setting(cross_adapter=True),
    "field: inv_adapter without tensors": setting(inv_adapter="nice"),
    "field: inv_adapter of no kind": setting(inv_adapter={"a": 1}),
    "field: invertible_adapter is a list": setting(invertible_adapter=[1]),
    "field: phm_layer": setting(phm_layer=True),
    "field: another order": setting(original_ln_before=False),
    "tensors: no file": lambda folder: (folder / "pytorch_adapter.bin").unlink(),
    "tensors: empty": raw("pytorch_adapter.bin", b""),
    "tensors: text": raw("pytorch_adapter.bin", b"version https://git-lfs.github.com/spec/v1"),
    "tensors: a folder": lambda folder: (
        (folder / "pytorch_adapter.bin").unlink(),
        (folder / "pytorch_adapter.bin").mkdir(),
    ),
    "tensors: a pipe": fifo("pytorch_adapter.bin"),
    "tensors: a device": device("pytorch_adapter.bin"),
    "tensors: cut off": lambda folder: (p := folder / "pytorch_adapter.bin").write_bytes(p.read_bytes()[:200]),
    "tensors: half": lambda folder: (p := folder / "pytorch_adapter.bin").write_bytes(
        p.read_bytes()[: p.stat().st_size // 2]
    ),
    "tensors: the end": lambda folder: (p := folder / "pytorch_adapter.bin").write_bytes(p.read_bytes()[:-30]),
    "tensors: a zip bomb": zip_bomb,
    "tensors: safetensors cut off": raw("adapter.safetensors", b"\xff" * 7),
    "tensors: safetensors with a large header": raw("adapter.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
    "tensors: safetensors with a deep header": raw(
        "adapter.safetensors", (200000).to_bytes(8, "little") + b'{"a":' * 40000
    ),
    "tensors: none": on_tensors(lambda found: {}),
    "tensors: a list": on_tensors(lambda found: list(found.values())),
    "tensors: numbered": on_tensors(lambda found: dict(enumerate(found.values()))),
    "tensors: text among them": on_tensors(lambda found: {**found, "x": "y"}),
    "tensors: code": on_tensors(lambda found: {**found, "x": Executed()}),
    "tensors: a plain pickle": lambda folder: (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps(Executed())),
    "tensors: of another adapter": on_tensors(
        lambda found: {**found, **{k.replace(".qu.", ".en."): v for k, v in found.items()}}
    ),
    "tensors: all of another adapter": on_tensors(
        lambda found: {k.replace(".qu.", ".en."): v for k, v in found.items()}
    ),
    "tensors: one missing": on_tensors(lambda found: dict(list(found.items())[1:])),
    "tensors: a layer missing": on_tensors(lambda found: dict(list(found.items())[4:])),
    "tensors: a layer too many": on_tensors(
        lambda f: {**f, **{k.replace("layer.0", "layer.7"): v for k, v in f.items()}}
    ),
    "tensors: the same layer twice": on_tensors(
        lambda f: {**f, **{k.replace("bert.", "roberta."): v for k, v in f.items()}}
    ),
    "tensors: attention that the config denies": on_tensors(
        lambda f: {**f, **{k.replace("output.adapters", "attention.output.adapters"): v for k, v in f.items()}}
    ),
    "tensors: invertible ones that the config denies": on_tensors(
        lambda found: {**found, "bert.invertible_adapters.qu.F.0.weight": torch.ones(8, 16)}
    ),
    "tensors: LoRA": on_tensors(lambda found: {"bert.encoder.layer.0.loras.qu.lora_A": torch.ones(2, 2)}),
    "tensors: a long number of a layer": on_tensors(
        lambda f: {k.replace("layer.0", "layer." + "1" * 5000): v for k, v in f.items()}
    ),
    "tensors: odd keys": on_tensors(lambda found: {**found, "\ud800\0": torch.ones(1), "": torch.ones(1)}),
    "tensors: a long key": on_tensors(lambda found: {**found, "adapters." * 10**5: torch.ones(1)}),
    "tensors: NaN": first(lambda tensor: tensor * float("nan")),
    "tensors: infinite": first(lambda tensor: tensor / 0),
    "tensors: beyond float32": first(lambda tensor: tensor.double() * 1e300),
    "tensors: integers": every(lambda tensor: tensor.long()),
    "tensors: truth values": every(lambda tensor: tensor > 0),
    "tensors: complex": every(lambda tensor: tensor.to(torch.complex64)),
    "tensors: eight bits": every(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "tensors: sparse": every(lambda tensor: tensor.to_sparse()),
    "tensors: CSR": first(lambda tensor: tensor.to_sparse_csr()),
    "tensors: meta": every(lambda tensor: tensor.to("meta")),
    "tensors: quantised": first(lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "tensors: expanded": first(expanded),
    "tensors: expanded twice": first(lambda tensor: torch.zeros(1, 1).expand(10**5, 10**5)),
    "tensors: no dimension": every(lambda tensor: tensor.sum()),
    "tensors: no elements": every(lambda tensor: tensor[:0]),
    "tensors: one dimension": first(lambda tensor: tensor.reshape(-1)),
    "tensors: transposed": first(lambda tensor: tensor.t()),
    "tensors: four dimensions": first(lambda tensor: tensor[None, None]),
    "tensors: sizes that differ": first(lambda tensor: tensor[:4]),
}


@pytest.mark.parametrize("what", HUB)
def test_adapter_hub(what, tmp_path):
    folder = write_hub(tmp_path / "adapter")
    try:
        HUB[what](folder)
    except ModuleNotFoundError as error:
        # pickle looks for torch's names in all modules, and asks lazy ones of transformers 5.6 for them.
        pytest.skip(f"the file cannot be written here: {error}")
    base = bert()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    modules = [(name, type(module)) for name, module in base.named_modules()]
    with little_time_and_memory(), pytest.raises(SparseError) as refusal:
        load_adapter_hub(base, folder)
    assert ADVICE not in str(refusal.value)
    assert len(str(refusal.value)) < 6000 or "long" in what
    assert [(name, type(module)) for name, module in base.named_modules()] == modules
    assert not hasattr(base, "peft_config")
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def test_the_table_is_about_its_changes(tmp_path):
    load_adapter_hub(bert(), write_hub(tmp_path))
