"""Files of somebody else's, made to hurt: every reader refuses them by an error of ours, at once, touching nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    MadGConfig,
    RandConfig,
    extract_adapter,
    inspect_adapter,
    load_typology,
    merge_checkpoint,
)
from peft_sparse.core.gaps import GapHeader
from peft_sparse.errors import SparseError
from tests.support.adapter_hub import write_hub
from tests.support.hostile import Change, Executed, device, fifo, little_time_and_memory, on_config, raw
from tests.support.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")

# ---- adapters of our own -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    llama().save_pretrained(root / "base")
    config = RandConfig(density=0.1, target_modules=["q_proj", "up_proj"], init_weights=False)
    get_peft_model(llama(), config).save_pretrained(root / "sparse")
    get_peft_model(llama(), BottleneckConfig(bottleneck_size=4)).save_pretrained(root / "bottleneck")
    madg = MadGConfig(bottleneck_size=4, language_dim=4, typology={"eng": [1.0, 0.0], "ind": [0.0, 1.0]})
    get_peft_model(llama(), madg).save_pretrained(root / "madg")
    get_peft_model(llama(), AdaSftConfig(target_modules=["q_proj"])).save_pretrained(root / "ada")
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(llama(), lora).save_pretrained(root / "lora")
    return root


def ours(**fields) -> Change:
    return on_config(lambda config: config.update(fields))


def weights(change: Callable[[dict], dict]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


def coded(header: GapHeader, payload: int) -> Change:
    """A support in every tensor that claims much and holds zeros."""
    packed = torch.frombuffer(bytearray(header.pack() + bytes(payload)), dtype=torch.uint8)
    return weights(lambda found: {k: packed.clone() if k.endswith("_extra_state") else v for k, v in found.items()})


def a_hole(folder: Path) -> None:
    """A safetensors file that claims four gigabytes, of which the disk holds nothing."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, 2**32]}}).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2**32)


# Nothing that a guard against nested repeats would see.
ENDLESS = r"^(?:(?:.|[a-z]){1,20}){1,20}[A-Z]"
OURS: dict[str, Change] = {
    "config: deep": raw("adapter_config.json", b'{"counts":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "config: a pipe": fifo("adapter_config.json"),
    "config: of AdapterHub": write_hub,
    "config: of the SpIEL fork": on_config(lambda config: {"peft_type": "SFT"}),
    "config: composable-sft": lambda folder: (
        (folder / "adapter_config.json").unlink(),
        torch.save({}, folder / "pytorch_diff.bin"),
    ),
    "budget: an endless regex": ours(budget={ENDLESS: 1.0}),
    "budget: deep parentheses": ours(budget={"(" * 3000 + ")" * 3000: 1.0}),
    "budget: repeated beyond integers": ours(budget={"a{99999999999}": 1.0}),
    "weights: a pipe": fifo("adapter_model.safetensors"),
    "weights: a device": device("adapter_model.safetensors"),
    "weights: a hole": a_hole,
    "weights: many zeros": coded(GapHeader(0, (2**40,), 1), 2**24),
    "weights: many indices": coded(GapHeader(0, (2**40,), 2**39), 100),
}


@pytest.mark.parametrize("what", OURS)
def test_sparse_adapters_are_read_by_inspect(what, saved, tmp_path):
    folder = copied(saved / "sparse", tmp_path / "a")
    OURS[what](folder)
    with little_time_and_memory(), pytest.raises(SparseError):
        inspect_adapter(folder)


@pytest.mark.parametrize("what", [name for name in OURS if not name.startswith("budget")])
def test_sparse_adapters_are_read_by_merge_and_extract(what, saved, tmp_path):
    folder = copied(saved / "sparse", tmp_path / "a")
    OURS[what](folder)
    with little_time_and_memory():
        with pytest.raises(SparseError):
            merge_checkpoint(saved / "base", [folder], tmp_path / "out")
        with pytest.raises(SparseError):
            extract_adapter(saved / "base", folder, tmp_path / "out", density=0.1)
    assert not (tmp_path / "out").exists()


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# Sizes that a config claims are those of `tuners/bottleneck/size.py`'s own tests.
LOADED: dict[str, tuple[str, Change]] = {
    "bottleneck: scaling beyond floats": ("bottleneck", ours(scaling=10**400)),
    "bottleneck: layers of no kind": ("bottleneck", ours(layers_to_transform=[None, {}])),
    "bottleneck: targets of no kind": ("bottleneck", ours(target_modules=5)),
    "bottleneck: an endless regex": ("bottleneck", ours(target_modules=ENDLESS)),
    "madg: a typology of nothing": ("madg", ours(saved_typology={})),
    "madg: a typology of lists": ("madg", ours(saved_typology={"format": 1, "feature_names": [[1]], "vectors": []})),
    "sparse: a hole": ("sparse", a_hole),
    "sparse: many zeros": ("sparse", OURS["weights: many zeros"]),
}


@pytest.mark.parametrize("what", LOADED)
def test_adapters_of_our_own_are_loaded(what, saved, tmp_path):
    kind, change = LOADED[what]
    folder = copied(saved / kind, tmp_path / "a")
    change(folder)
    base = llama()
    modules = [(name, type(module)) for name, module in base.named_modules()]
    with little_time_and_memory(), pytest.raises(ValueError):
        PeftModel.from_pretrained(base, folder)
    assert [(name, type(module)) for name, module in base.named_modules()] == modules


@pytest.mark.parametrize("pattern", [ENDLESS, r"(([a-z_.0-9])+)+!", r"(a|aa)+$", r"(.*a){30}"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize("kind", ["sparse", "bottleneck"])
def test_every_regex_comes_to_an_end(kind, field, pattern, saved, tmp_path):
    """Refused, or found to match nothing: what Python's own `re` would look at for hours."""
    folder = copied(saved / kind, tmp_path / "a")
    ours(**{field: [pattern] if field == "modules_to_save" else pattern})(folder)
    with little_time_and_memory(), contextlib.suppress(SparseError):
        PeftModel.from_pretrained(llama(), folder)


VALUES = [5, -1, "x", [], {}, True, 1e308, 10**400, [[1]], {"a": 1}, [None], {"a": [1]}]


@pytest.mark.parametrize("kind", ["sparse", "bottleneck", "madg", "ada"])
def test_every_field_of_a_config_takes_or_refuses_anything(kind, saved):
    fields = json.loads((saved / kind / "adapter_config.json").read_text())
    taken = 0
    for name in fields.keys() - {"peft_type"}:
        for value in VALUES:
            # PEFT itself checks the task's name.
            with contextlib.suppress(ValueError if name == "task_type" else SparseError):
                PeftConfig.from_peft_type(**{**fields, name: value})
                taken += 1
    assert 0 < taken < len(fields) * len(VALUES) * 0.9


@pytest.mark.parametrize(
    "name", ["modules_to_save", "auto_mapping", "values_dtype", "base_model_name_or_path", "counts"]
)
def test_what_readers_need_of_a_config_is_checked(name, saved, tmp_path):
    folder = copied(saved / "sparse", tmp_path / "a")
    for value in [5, [[1]], {"parent_library": 3}, [None], {"a": -1}, {"a": "b"}, "../x"]:
        ours(**{name: value})(folder)
        # Some values are right ones for some of the fields.
        with contextlib.suppress(SparseError):
            inspect_adapter(folder)
            merge_checkpoint(saved / "base", [folder], tmp_path / "out", overwrite=True)


LORA: dict[str, Change] = {
    "a large rank": ours(r=10**9),
    "a large rank of a layer": ours(rank_pattern={"q_proj": 10**9}),
    "a rank that is none": ours(r="x"),
    "an endless regex": ours(target_modules=ENDLESS),
    "an unknown type": ours(peft_type="NONE SUCH"),
    "another library's type": ours(peft_type="ROSA"),
    "a pipe": fifo("adapter_model.safetensors"),
    "fields of no kind": ours(target_modules=5, lora_alpha="x"),
}


@pytest.mark.parametrize("what", LORA)
def test_extraction_from_lora(what, saved, tmp_path):
    folder = copied(saved / "lora", tmp_path / "a")
    LORA[what](folder)
    with little_time_and_memory(), pytest.raises(SparseError):
        extract_adapter(saved / "base", folder, tmp_path / "out", density=0.1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"hidden_size": "x"}, {"num_attention_heads": 0}])
def test_a_base_whose_config_lies(change, saved, tmp_path):
    base = copied(saved / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    with little_time_and_memory(), pytest.raises(SparseError):
        extract_adapter(base, saved / "lora", tmp_path / "out", density=0.1)
    with little_time_and_memory(), pytest.raises(SparseError):
        extract_adapter(saved / "base", base, tmp_path / "out", density=0.1)
    with little_time_and_memory(), pytest.raises(SparseError):
        merge_checkpoint(base, [saved / "sparse"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- typological tables --------------------------------------------------------------------------


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data.npy", "w") as member:
        member.write(
            b"\x93NUMPY\x01\x00v\x00"
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000,), }".ljust(117)
            + b"\n"
        )
        for _ in range(200):
            member.write(bytes(2**20))


TABLES: dict[str, Callable[[Path], object]] = {
    "bomb.npz": bomb,
    "deep.json": lambda path: path.write_text("[" * 10**5),
    "long.csv": lambda path: path.write_text("code,A\neng," + "1" * 10**6),
    "bytes.csv": lambda path: path.write_bytes(b"code,A\n\xff,1\n"),
    "list.json": lambda path: path.write_text("[1]"),
    "values.json": lambda path: path.write_text(
        '{"features": {"syntax_knn": ["a"]}, "vectors": {"eng": {"syntax_knn": [{}]}}}'
    ),
    "pipe.csv": os.mkfifo,
    "pipe.npz": os.mkfifo,
    "device.json": lambda path: path.symlink_to("/dev/zero"),
    "pickled.npz": lambda path: path.write_bytes(pickle.dumps(Executed())),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_features(name, tmp_path):
    TABLES[name](tmp_path / name)
    with little_time_and_memory(), pytest.raises(SparseError):
        load_typology(tmp_path / name, features=["syntax_knn"])
