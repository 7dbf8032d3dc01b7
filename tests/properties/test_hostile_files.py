"""Files of somebody else's, made to hurt: every reader refuses them by an error of ours, at once, touching nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    MadGConfig,
    RandConfig,
    extract_adapter,
    inspect_adapter,
    load_adapter_hub,
    load_typology,
    merge_checkpoint,
)
from peft_sparse.core.gaps import GapHeader
from peft_sparse.errors import SparseError
from tests.support.adapter_hub import bert, tensors, write_hub

pytestmark = pytest.mark.filterwarnings("ignore")

SECONDS, MEGABYTES = 3, 100  # a second on a quiet machine
ADVICE = "weights_only"
Change = Callable[[Path], object]


@contextlib.contextmanager
def little_time_and_memory() -> Iterator[None]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1000


# ---- AdapterHub ----------------------------------------------------------------------------------


class Executed:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def on_config(change: Callable[[dict], object]) -> Change:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        changed = change(config)
        (folder / "adapter_config.json").write_text(json.dumps(config if changed is None else changed))

    return apply


def setting(**fields) -> Change:
    return on_config(lambda config: config["config"].update(fields))


def on_tensors(change: Callable[[dict], object]) -> Change:
    return lambda folder: torch.save(change(tensors()), folder / "pytorch_adapter.bin")


def raw(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def first(change: Callable[[torch.Tensor], object]) -> Change:
    """One tensor changed."""

    def apply(found: dict) -> dict:
        key = next(iter(found))
        return {**found, key: change(found[key])}

    return on_tensors(apply)


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return on_tensors(lambda found: {key: change(tensor) for key, tensor in found.items()})


def fifo(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def device(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return apply


def zip_bomb(folder: Path) -> None:
    """The same archive as torch's, with a storage of two gigabytes of zeros that packs into two megabytes."""
    path = folder / "pytorch_adapter.bin"
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        with archive.open("pytorch_adapter/data/999", "w", force_zip64=True) as member:
            for _ in range(64):
                member.write(bytes(2**20))


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """A claim of forty gigabytes, of four bytes."""
    return torch.zeros(1).expand(10**10)


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
    HUB[what](folder)
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


# ---- adapters of our own -------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


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
