"""Damaged adapter files: each one is refused, with the model as it was, or gives exactly the adapter that was saved."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from peft_sparse import RandConfig, iter_deltas
from peft_sparse.checkpoints import native
from peft_sparse.errors import SparseError
from peft_sparse.tuners.sparse_ft.layers.base import SparseLayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = native.PREFIX
DIGEST = PREFIX + native.DIGEST_KEY


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(ids)).tanh()))


def config(seed: int) -> RandConfig:
    return RandConfig(
        density=0.2,
        seed=seed,
        init_weights=False,
        target_modules=["embed", "up", "down"],
        target_biases=True,
        modules_to_save=["head"],
    )


def fresh_base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IDS = torch.arange(12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, PeftModel]:
    """A folder with an adapter, and the model that saved it."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(fresh_base(), config(1)).eval()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(3)
    model.save_pretrained(folder)
    return folder, model


# ---- what a model is, and whether it is the same ------------------------------------------------


def state_of(model: nn.Module) -> dict[str, object]:
    """All that a refusal must leave alone: modules, tensors bit for bit, adapters, and what the model computes."""
    with torch.no_grad():
        output = model(IDS)
    state: dict[str, object] = {f"tensor {key}": t.detach().clone() for key, t in model.state_dict().items()}
    state["output"] = output
    state["modules"] = [(name, type(module).__name__) for name, module in model.named_modules()]
    state["trainable"] = [name for name, p in model.named_parameters() if p.requires_grad]
    state["training"] = [module.training for module in model.modules()]
    if isinstance(model, PeftModel):
        state["adapters"] = {name: c.to_dict() for name, c in model.peft_config.items()}
        state["active"] = model.active_adapters
        layers = [m for m in model.modules() if isinstance(m, (SparseLayer, AuxiliaryTrainingWrapper))]
        state["active in layers"] = [list(layer.active_adapters) for layer in layers]
    else:
        state["attributes"] = sorted(vars(model))
    return state


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def assert_adapter(model: PeftModel, name: str, reference: PeftModel) -> None:
    """The adapter of the model is, bit for bit, the one that was saved."""
    found = {parameter: delta.delta for parameter, _, _, delta in iter_deltas(model, name)}
    expected = {parameter: delta.delta for parameter, _, _, delta in iter_deltas(reference, "default")}
    assert found.keys() == expected.keys()
    for parameter, delta in expected.items():
        assert torch.equal(found[parameter].indices, delta.indices)
        assert torch.equal(found[parameter].values, delta.values)
    head = model.base_model.model.head.modules_to_save[name].state_dict()
    for key, tensor in reference.base_model.model.head.modules_to_save["default"].state_dict().items():
        assert torch.equal(head[key], tensor)


# ---- mutations: bytes of the file and fields of the config -> damaged ones ----------------------

Files = tuple[bytes, dict]
Mutation = Callable[[bytes, dict, random.Random], Files]
TENSOR_MUTATIONS: list[Mutation] = []


def header_size(weights: bytes) -> int:
    return 8 + struct.unpack("<Q", weights[:8])[0]


def flip(weights: bytes, position: int, bit: int) -> bytes:
    damaged = bytearray(weights)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def flip_anywhere(weights: bytes, fields: dict, rng: random.Random) -> Files:
    return flip(weights, rng.randrange(len(weights)), rng.randrange(8)), fields


def flip_in_header(weights: bytes, fields: dict, rng: random.Random) -> Files:
    return flip(weights, rng.randrange(header_size(weights)), rng.randrange(8)), fields


def flip_in_size(weights: bytes, fields: dict, rng: random.Random) -> Files:
    return flip(weights, rng.randrange(8), rng.randrange(8)), fields


def overwrite(weights: bytes, fields: dict, rng: random.Random) -> Files:
    start, length = rng.randrange(len(weights)), rng.randrange(1, 64)
    return weights[:start] + rng.randbytes(len(weights[start : start + length])) + weights[start + length :], fields


def truncate(weights: bytes, fields: dict, rng: random.Random) -> Files:
    return weights[: rng.choice([0, 7, 8, header_size(weights), rng.randrange(len(weights)), len(weights) - 1])], fields


def extend(weights: bytes, fields: dict, rng: random.Random) -> Files:
    return weights + rng.randbytes(rng.randrange(1, 32)), fields


def edit_header(weights: bytes, fields: dict, rng: random.Random) -> Files:
    """Another dtype, shape or place for one tensor, over the same bytes."""
    end = header_size(weights)
    header = json.loads(weights[8:end])
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    change = rng.choice(["dtype", "shape", "place", "reshape"])
    if change == "dtype":
        entry["dtype"] = rng.choice(
            ["F32", "I32", "U8", "I8", "BOOL", "F16", "BF16", "F64", "F8_E4M3", "C64", "F4", "X"]
        )
    elif change == "shape":
        entry["shape"] = rng.choice([[size], [], [0], [1, *entry["shape"]], [2**63], [-1], [*entry["shape"], 1]])
    elif change == "place":
        entry["data_offsets"] = [offset + rng.choice([-4, 4, 8, 2**40]) for offset in entry["data_offsets"]]
    else:
        entry["dtype"], entry["shape"] = "U8", [size]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[end:], fields


def repeat_key(weights: bytes, fields: dict, rng: random.Random) -> Files:
    """The same key twice in the JSON header, the second time for another tensor's bytes."""
    end = header_size(weights)
    header = json.loads(weights[8:end])
    keys = [key for key in header if key != "__metadata__"]
    first, second = rng.sample(keys, 2)
    text = weights[8:end].rstrip()[:-1] + f',"{first}":{json.dumps(header[second])}}}'.encode()
    return struct.pack("<Q", len(text)) + text + weights[end:], fields


def edit_counts(weights: bytes, fields: dict, rng: random.Random) -> Files:
    counts = dict(fields["counts"])
    name = rng.choice(sorted(counts))
    change = rng.choice(["value", "drop", "add", "rename", "none", "empty", "type"])
    if change == "value":
        counts[name] = rng.choice([0, counts[name] + 1, counts[name] - 1, -1, 10**12, None, "3", 2.5, True, [3]])
    elif change == "drop":
        del counts[name]
    elif change == "add":
        counts[rng.choice(["head.weight", "other.weight", "up", "", "up.sparse_ft_weight"])] = 1
    elif change == "rename":
        counts[name + "x"] = counts.pop(name)
    else:
        counts = {"none": None, "empty": {}, "type": [1, 2]}[change]
    return weights, {**fields, "counts": counts}


def on_tensors(change: Callable[[dict[str, Tensor], random.Random], None]) -> Mutation:
    """A mutation of the dictionary of tensors, written as a well-formed file whose digest is not brought up to date."""

    def mutate(weights: bytes, fields: dict, rng: random.Random) -> Files:
        tensors = {key: tensor.clone() for key, tensor in load(weights).items()}
        change(tensors, rng)
        return save(tensors, metadata={"format": "pt"}), fields

    mutate.__name__ = change.__name__
    TENSOR_MUTATIONS.append(mutate)
    return mutate


@on_tensors
def swap(tensors: dict[str, Tensor], rng: random.Random) -> None:
    a, b = rng.sample(sorted(tensors), 2)
    tensors[a], tensors[b] = tensors[b], tensors[a]


@on_tensors
def swap_alike(tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Two tensors of the same kind and size, which no shape tells apart."""
    name = rng.choice(["values", "_extra_state"])
    a, b = rng.choice(["weight", "bias"]), rng.choice(["weight", "bias"])
    up, down = f"{PREFIX}up.sparse_ft_{a}.{name}", f"{PREFIX}down.sparse_ft_{b}.{name}"
    tensors[up], tensors[down] = tensors[down], tensors[up]


@on_tensors
def drop(tensors: dict[str, Tensor], rng: random.Random) -> None:
    del tensors[rng.choice(sorted(tensors))]


@on_tensors
def drop_digest(tensors: dict[str, Tensor], rng: random.Random) -> None:
    del tensors[DIGEST]


@on_tensors
def duplicate(tensors: dict[str, Tensor], rng: random.Random) -> None:
    key = rng.choice(sorted(tensors))
    other = rng.choice(
        [key.removeprefix(PREFIX), key.replace("sparse_ft_", "sparse_ft_x"), key + "2", "_orig_mod." + key]
    )
    tensors[other] = tensors[key].clone()


@on_tensors
def add_base_weight(tensors: dict[str, Tensor], rng: random.Random) -> None:
    """A tensor that PyTorch would load straight into the base model."""
    name, shape = rng.choice(
        [
            ("up.base_layer.weight", (8, 8)),
            ("up.weight", (8, 8)),
            ("embed.base_layer.weight", (12, 8)),
            ("head.original_module.bias", (2,)),
        ]
    )
    tensors[PREFIX + name] = torch.ones(shape)


@on_tensors
def retype(tensors: dict[str, Tensor], rng: random.Random) -> None:
    key = rng.choice([key for key in sorted(tensors) if key != DIGEST])
    dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8]
    tensors[key] = tensors[key].to(rng.choice(dtypes))


@on_tensors
def reshape(tensors: dict[str, Tensor], rng: random.Random) -> None:
    key = rng.choice(sorted(tensors))
    tensors[key] = rng.choice([tensors[key].reshape(1, -1), tensors[key].reshape(-1, 1), tensors[key].reshape(-1)[:-1]])


@on_tensors
def bump_version(tensors: dict[str, Tensor], rng: random.Random) -> None:
    key = rng.choice([key for key in sorted(tensors) if tensors[key].dtype == torch.uint8])
    tensors[key][4 if key == DIGEST else 0] = rng.choice([0, 2, 255])


@on_tensors
def change_an_element(tensors: dict[str, Tensor], rng: random.Random) -> None:
    tensor = tensors[rng.choice(sorted(tensors))].view(-1)
    tensor[rng.randrange(len(tensor))] += 1


def sealed(mutate: Mutation) -> Mutation:
    """The same damage under a digest that fits, as a careless tool would write it: the other checks have to find it."""

    def mutate_and_seal(weights: bytes, fields: dict, rng: random.Random) -> Files:
        damaged, fields = mutate(weights, fields, rng)
        return save(native.finish(load(damaged)), metadata={"format": "pt"}), fields

    mutate_and_seal.__name__ = f"sealed_{mutate.__name__}"
    return mutate_and_seal


def twice(weights: bytes, fields: dict, rng: random.Random) -> Files:
    for mutate in rng.sample([flip_anywhere, edit_counts, overwrite, edit_header], 2):
        weights, fields = mutate(weights, fields, rng)
    return weights, fields


@on_tensors
def drop_part_of_a_delta(tensors: dict[str, Tensor], rng: random.Random) -> None:
    del tensors[rng.choice([key for key in sorted(tensors) if "sparse_ft_" in key and key != DIGEST])]


SEALED = [sealed(m) for m in (drop_part_of_a_delta, add_base_weight, reshape)]
MUTATIONS: list[tuple[Mutation, int]] = [
    (flip_anywhere, 80),
    (flip_in_header, 80),
    (flip_in_size, 10),
    (overwrite, 30),
    (truncate, 16),
    (extend, 6),
    (edit_header, 50),
    (repeat_key, 10),
    (edit_counts, 40),
    (twice, 20),
    *((mutate, 1 if mutate.__name__ == "drop_digest" else 12) for mutate in TENSOR_MUTATIONS),
    *((mutate, 12) for mutate in SEALED),
]


def damaged_files(folder: Path, mutate: Mutation, number: int, target: Path) -> Iterator[Path]:
    weights, fields = (folder / WEIGHTS).read_bytes(), json.loads((folder / CONFIG).read_text())
    rng = random.Random(mutate.__name__)
    for _ in range(number):
        damaged, damaged_fields = mutate(weights, copy.deepcopy(fields), rng)
        (target / WEIGHTS).write_bytes(damaged)
        (target / CONFIG).write_text(json.dumps(damaged_fields))
        yield target


def test_hundreds_of_files_are_tried():
    assert sum(number for _, number in MUTATIONS) >= 400


@pytest.mark.parametrize(("mutate", "number"), MUTATIONS, ids=lambda v: getattr(v, "__name__", None))
def test_a_damaged_file_is_refused_or_equal(saved, tmp_path, mutate, number):
    """Loaded as a first adapter, as a second one, and into one that is there (a resume)."""
    folder, reference = saved
    base, second = fresh_base(), get_peft_model(fresh_base(), config(2), adapter_name="other").eval()
    resumed = get_peft_model(fresh_base(), config(3)).eval()
    states = [state_of(model) for model in (base, second, resumed)]
    refused = 0
    for target in damaged_files(folder, mutate, number, tmp_path):
        try:
            loaded = PeftModel.from_pretrained(base, target)
        except SparseError:
            refused += 1
            assert_same(state_of(base), states[0])
        else:
            assert_adapter(loaded, "default", reference)
            base = fresh_base()
        try:
            second.load_adapter(target, "new")
        except SparseError:
            pass
        else:
            assert_adapter(second, "new", reference)
            second.delete_adapter("new")
        assert_same(state_of(second), states[1])
        try:
            resumed.load_adapter(target, "default")
        except (SparseError, SafetensorError, KeyError):  # PEFT reads the file, and misses a head, before it asks us
            assert_same(state_of(resumed), states[2])
        else:
            assert_adapter(resumed, "default", reference)
            resumed = get_peft_model(fresh_base(), config(3)).eval()
    # A header that says the same in other words, or counts that are left out, change nothing.
    harmless = mutate in (flip_in_header, flip_anywhere, edit_header, edit_counts)
    assert refused >= number * (0.7 if harmless else 1)


def test_the_undamaged_file_loads(saved, tmp_path):
    """The oracle of the fuzz test: what it calls equal is equal, and it can tell."""
    folder, reference = saved
    loaded = PeftModel.from_pretrained(fresh_base(), folder)
    assert_adapter(loaded, "default", reference)
    with torch.no_grad():
        assert torch.equal(loaded(IDS), reference(IDS))
        loaded.base_model.model.up.sparse_ft_weight["default"].values[0] += 1
    with pytest.raises(AssertionError):
        assert_adapter(loaded, "default", reference)
    before = state_of(loaded)
    loaded.base_model.model.down.base_layer.weight.data[0, 0] += 1e-6
    with pytest.raises(AssertionError):
        assert_same(state_of(loaded), before)
