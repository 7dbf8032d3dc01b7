"""The native file as dictionaries of tensors: names, digest, and every check of `verify`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_sparse.checkpoints import native
from peft_sparse.checkpoints.files import verify_before_loading
from peft_sparse.core.delta import SparseDelta
from peft_sparse.core.gaps import encode_gaps
from peft_sparse.errors import FormatError

QUERY, BIAS, HEAD = "layers.0.query.weight", "layers.0.query.bias", "classifier.weight"
COUNTS = {QUERY: 3, BIAS: 1}
SHAPES = {QUERY: (4, 8), BIAS: (4,)}
VALUES, CODED = (native.PREFIX + name for name in native.tensor_names(QUERY))
DIGEST = native.PREFIX + native.DIGEST_KEY


def support(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int32)


def deltas() -> dict[str, SparseDelta]:
    return {
        QUERY: SparseDelta(support(1, 5, 30), torch.tensor([1.0, -2.0, 0.5]), (4, 8)),
        BIAS: SparseDelta(support(2), torch.tensor([0.25]), (4,)),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return native.build(deltas(), {HEAD: torch.arange(6.0).view(2, 3)})


def verify(tensors, **kwargs):
    everything = {"counts": COUNTS, "shapes": SHAPES, "heads": {HEAD: (2, 3)}, "extras": ()}
    return native.verify(tensors, **{**everything, **kwargs})


def assert_same(found: dict[str, SparseDelta], expected: dict[str, SparseDelta]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.equal(found[name].indices, delta.indices)
        assert found[name].indices.dtype == delta.indices.dtype
        assert torch.equal(found[name].values, delta.values)
        assert found[name].values.dtype == delta.values.dtype
        assert found[name].shape == delta.shape


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "adapter_name", "name"),
    [
        ("base_model.model.a.b.sparse_ft_weight.values", None, "a.b.sparse_ft_weight.values"),
        ("base_model.model.a.b.sparse_ft_weight.default.values", "default", "a.b.sparse_ft_weight.values"),
        ("a.sparse_ft_bias.values._extra_state", "values", "a.sparse_ft_bias._extra_state"),
        ("a._fsdp_wrapped_module.b._orig_mod.weight", None, "a.b.weight"),
        ("_fsdp_wrapped_module.base_model.model.a.weight", None, "a.weight"),
        ("base_model.model.classifier.modules_to_save.de.dense.weight", "de", "classifier.dense.weight"),
        ("base_model.model.classifier.dense.weight", "dense", "classifier.dense.weight"),
        ("base_model.model.e.token_adapter.trainable_tokens_delta.de", "de", "e.token_adapter.trainable_tokens_delta"),
        ("sparse_ft_digest", "default", "sparse_ft_digest"),
    ],
)
def test_canonical_name(key, adapter_name, name):
    assert native.canonical_name(key, adapter_name=adapter_name) == name


@pytest.mark.parametrize("parameter", ["weight", "bias", "a.weight", "a.b.0.bias"])
def test_tensor_names_and_parameter_of_are_inverse(parameter):
    values, coded = native.tensor_names(parameter)
    assert native.parameter_of(values) == native.parameter_of(coded) == parameter
    assert values != coded


@pytest.mark.parametrize(
    "name", ["classifier.weight", "a.sparse_ft_weight.other", "values", "sparse_ft_digest", "a.sparse_ft_gain.values"]
)
def test_other_tensors_belong_to_no_parameter(name):
    assert native.parameter_of(name) is None


# ---- digest -------------------------------------------------------------------------------------


def test_digest_depends_on_content_only():
    a, b = torch.arange(12.0).view(3, 4), torch.tensor([1, 2], dtype=torch.uint8)
    reference = native.digest({"a": a, "b": b})
    assert reference.dtype == torch.uint8
    assert reference.shape == (32,)
    transposed_in_memory = a.t().contiguous().t()
    assert not transposed_in_memory.is_contiguous()
    assert torch.equal(native.digest({"b": b, "a": transposed_in_memory}), reference)
    assert torch.equal(native.digest({"b": b, "a": a.clone().requires_grad_()}), reference)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.zeros(4)},
        {"b": torch.ones(4)},
        {"a": torch.ones(4), "b": torch.ones(0)},
        {"a": torch.ones(2, 2)},
        {"a": torch.ones(1, 4)},
        {"a": torch.ones(4).view(torch.int32)},
        {"a": torch.ones(4, dtype=torch.bfloat16)},
        {},
    ],
)
def test_digest_sees_names_dtypes_shapes_and_bytes(changed):
    assert not torch.equal(native.digest(changed), native.digest({"a": torch.ones(4)}))


def test_digest_cannot_be_shifted_between_neighbours():
    one = native.digest({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])})
    assert not torch.equal(native.digest({"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])}), one)


def test_digest_of_empty_and_scalar_tensors():
    assert not torch.equal(native.digest({"a": torch.empty(0)}), native.digest({"a": torch.tensor(0.0)}))


def test_digest_takes_little_endian_bytes(monkeypatch):
    little = native.digest({"a": torch.tensor([1, 256], dtype=torch.int32)})
    monkeypatch.setattr(native.sys, "byteorder", "big")
    swapped_in_memory = torch.tensor([1 << 24, 1 << 16], dtype=torch.int32)
    assert torch.equal(native.digest({"a": swapped_in_memory}), little)


def test_digest_refuses_what_has_no_bytes():
    with pytest.raises(FormatError, match=r"tensor 'a' has no data .meta device.*gather"):
        native.digest({"a": torch.empty(2, device="meta")})
    with pytest.raises(FormatError, match=r"tensor 'a' has dtype torch.complex64.*'BF16'"):
        native.digest({"a": torch.zeros(2, dtype=torch.complex64)})


# ---- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_build_and_verify_are_inverse(dtype):
    tensors = native.build(deltas(), {HEAD: torch.ones(2, 3)}, values_dtype=dtype)
    rounded = {name: SparseDelta(d.indices, d.values.to(dtype), d.shape) for name, d in deltas().items()}
    assert_same(verify(tensors), rounded)


def test_an_adapter_without_weights_is_valid():
    empty = {QUERY: SparseDelta.empty((4, 8))}
    assert_same(native.verify(native.build(empty), counts={QUERY: 0}, shapes={QUERY: (4, 8)}, heads={}), empty)


def test_the_digest_is_the_same_from_a_model_and_for_the_file(tensors):
    in_model = {
        key.replace("sparse_ft_weight.", "sparse_ft_weight.de.").replace(
            "sparse_ft_bias.", "sparse_ft_bias.de."
        ): tensor
        for key, tensor in tensors.items()
        if "sparse_ft" in key and key != DIGEST
    }
    finished = native.finish(in_model, {native.PREFIX + HEAD: tensors[native.PREFIX + HEAD]}, adapter_name="de")
    assert native.PREFIX + HEAD not in finished
    assert torch.equal(finished[DIGEST], tensors[DIGEST])
    bare = native.finish({key.removeprefix(native.PREFIX): tensor for key, tensor in tensors.items()})
    assert torch.equal(bare[native.DIGEST_KEY], tensors[DIGEST])
    assert DIGEST not in bare


def test_verify_takes_model_keys(tensors):
    renamed = {
        key.replace("weight.", "weight.de.")
        .replace("bias.", "bias.de.")
        .replace("classifier.", "classifier.modules_to_save.de."): t
        for key, t in tensors.items()
    }
    assert "base_model.model.classifier.modules_to_save.de.weight" in renamed
    assert_same(verify(renamed, adapter_name="de"), deltas())
    with pytest.raises(FormatError):
        verify(renamed, adapter_name="fr")


def test_finish_replaces_an_old_digest(tensors):
    edited = {**tensors, VALUES: tensors[VALUES] * 2}
    with pytest.raises(FormatError, match=r"sparse_ft_digest.*native.finish"):
        verify(edited)
    assert torch.equal(verify(native.finish(edited))[QUERY].values, torch.tensor([2.0, -4.0, 1.0]))


def test_finish_casts_values_only(tensors):
    finished = native.finish(tensors, values_dtype=torch.bfloat16)
    assert finished[VALUES].dtype == torch.bfloat16
    assert finished[CODED].dtype == torch.uint8
    assert finished[native.PREFIX + HEAD].dtype == torch.float32
    assert tensors[VALUES].dtype == torch.float32


# ---- refusals -----------------------------------------------------------------------------------


def changed(tensors, key, tensor, *, seal=True):
    """The file with one tensor exchanged (dropped if None); under a new digest, other checks must find it."""
    edited = {name: t for name, t in tensors.items() if name != key}
    if tensor is not None:
        edited[key] = tensor
    return native.finish(edited) if seal else edited


def test_missing_and_surplus_tensors(tensors):
    values, coded = native.tensor_names(QUERY)
    for key, name in ((VALUES, values), (CODED, coded)):
        with pytest.raises(
            FormatError, match=f"adapter_model.safetensors: tensor '{re.escape(name)}' is missing.*again"
        ):
            verify(changed(tensors, key, None))
    with pytest.raises(FormatError, match=r"'classifier.weight' is missing"):
        verify(changed(tensors, native.PREFIX + HEAD, None, seal=False))
    with pytest.raises(FormatError, match=r"the head tensor 'classifier.weight' of this model is missing"):
        verify(changed(tensors, native.PREFIX + HEAD, None))
    with pytest.raises(
        FormatError, match=r"'classifier.weight' has shape .2, 3. in the file and .4, 3. in this.*num_labels"
    ):
        verify(tensors, heads={HEAD: (4, 3)})
    with pytest.raises(FormatError, match=r"tensor 'other.weight' has no place in this model"):
        verify({**tensors, "base_model.model.other.weight": torch.ones(1)})
    with pytest.raises(FormatError, match=r"tensor 'other.weight' has no place in this model"):
        verify(changed(tensors, "base_model.model.other.weight", torch.ones(1)))
    with pytest.raises(FormatError, match=r"tensor 'classifier.weight' occurs twice"):
        verify({**tensors, HEAD: torch.ones(1)})


def test_extras_travel_outside_the_digest(tensors):
    embedding = {"base_model.model.embed.weight": torch.ones(2)}
    assert_same(verify({**tensors, **embedding}, extras=["embed.weight"]), deltas())
    assert_same(verify({**tensors, **embedding}, extras=None), deltas())


def test_parameters_must_be_those_of_model_and_config(tensors):
    other = "layers.1.query.weight"
    with pytest.raises(FormatError, match=r"'layers.1.query.sparse_ft_weight.values' is missing, which the model asks"):
        verify(tensors, shapes={**SHAPES, other: (4, 8)})
    with pytest.raises(
        FormatError, match=r"sparse_ft_bias.values' is surplus: the model has no tuned parameter 'layers.0.query.bias'"
    ):
        verify(tensors, shapes={QUERY: (4, 8)})
    with pytest.raises(FormatError, match=r"is missing, which adapter_config.json .'counts'. asks for"):
        verify(tensors, counts={**COUNTS, other: 1})
    with pytest.raises(FormatError, match=r"is surplus: adapter_config.json .'counts'. has no tuned"):
        verify(tensors, counts={QUERY: 3})


@pytest.mark.parametrize("count", [2, 4, 0, -3, True, "3", None])
def test_counts_must_agree(tensors, count):
    counts = {**COUNTS, (BIAS if count is True else QUERY): count}
    with pytest.raises(FormatError, match=rf"holds \d weights, but adapter_config.json .'counts'. says {count!r}"):
        verify(tensors, counts=counts)


def test_shapes_must_agree(tensors):
    with pytest.raises(
        FormatError, match=r"_extra_state'.*shape .4, 8., but 'layers.0.query.weight' of this model has .8, 4."
    ):
        verify(tensors, shapes={**SHAPES, QUERY: (8, 4)})


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(3).to(torch.float8_e5m2),
        torch.ones(3, dtype=torch.int32),
        torch.ones(1, 3),
        torch.ones(3, 1),
        torch.tensor(1.0),
    ],
    ids=["float8", "int32", "row", "column", "scalar"],
)
def test_values_must_be_a_row_of_floats(tensors, values):
    with pytest.raises(
        FormatError,
        match=r"sparse_ft_weight.values' must be one-dimensional float32, bfloat16, .* or float64, got",
    ):
        verify(changed(tensors, VALUES, values))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_values_must_be_finite(tensors, broken):
    with pytest.raises(
        FormatError, match=r"sparse_ft_weight.values' holds 1 values that are NaN or infinite.*diverged"
    ):
        verify(changed(tensors, VALUES, torch.tensor([1.0, broken, 2.0])))


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_values_as_indices(tensors, count):
    with pytest.raises(
        FormatError, match=rf"_extra_state' of adapter_model.*holds 3 indices, but {count} are expected"
    ):
        verify(changed(tensors, VALUES, torch.ones(count)))


def test_indices_must_be_coded(tensors):
    for indices in (torch.tensor([1.0, 5.0, 30.0]), encode_gaps(support(1, 5, 30), (4, 8)).view(1, -1)):
        with pytest.raises(FormatError, match=r"_extra_state' must be one-dimensional uint8, got"):
            verify(changed(tensors, CODED, indices))
    out_of_range = encode_gaps(support(1, 5, 32), (5, 8))
    out_of_range[3] = 4  # the shape in the header, back to 4 x 8
    with pytest.raises(FormatError, match=r"_extra_state' of adapter_model.*outside"):
        verify(changed(tensors, CODED, out_of_range))


def test_digest_must_be_there_and_fit(tensors):
    with pytest.raises(FormatError, match=r"'sparse_ft_digest' is missing"):
        verify(changed(tensors, DIGEST, None, seal=False))
    for key in (VALUES, native.PREFIX + HEAD):
        flipped = tensors[key].clone()
        flipped.view(-1)[0] += 1
        with pytest.raises(FormatError, match=r"'sparse_ft_digest' does not fit"):
            verify(changed(tensors, key, flipped, seal=False))
    with pytest.raises(FormatError, match=r"'sparse_ft_digest' does not fit"):
        verify(changed(tensors, VALUES, tensors[VALUES].to(torch.bfloat16), seal=False))
    swapped = {
        "a.weight": SparseDelta(support(0), torch.ones(1), (2,)),
        "b.weight": SparseDelta(support(1), torch.ones(1), (2,)),
    }
    file = native.build(swapped)
    a, b = (native.PREFIX + native.tensor_names(name)[1] for name in swapped)
    with pytest.raises(FormatError, match=r"'sparse_ft_digest' does not fit"):
        native.verify({**file, a: file[b], b: file[a]})


@pytest.mark.parametrize("position", range(49 - 9 + len(HEAD)))
def test_every_byte_of_the_digest_tensor_counts(tensors, position):
    flipped = tensors[DIGEST].clone()
    assert flipped.numel() == 40 + len(HEAD)
    flipped[position] ^= 1
    with pytest.raises(FormatError, match=r"sparse_ft_digest|is missing"):
        verify({**tensors, DIGEST: flipped})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"PSFT",
        b"PSFT\1\0\0\0",
        b"ABCD" + bytes(60),
        b"PSFT\1\0\0\0" + bytes(32) + b"b\na",
        b"PSFT\1\0\0\0" + bytes(32) + b"\xff",
    ],
)
def test_malformed_digest_tensors(tensors, payload):
    with pytest.raises(FormatError, match="sparse_ft_digest"):
        verify({**tensors, DIGEST: torch.tensor(list(payload), dtype=torch.uint8)})
    with pytest.raises(FormatError, match="is not the digest"):
        verify({**tensors, DIGEST: tensors[DIGEST].float()})


def test_a_newer_version_says_what_to_do(tensors):
    newer = tensors[DIGEST].clone()
    newer[4] = native.VERSION + 1
    with pytest.raises(
        FormatError, match=r"says format version 2, this peft_sparse reads 1. Upgrade it with: pip install"
    ):
        verify({**tensors, DIGEST: newer})


def test_verify_changes_nothing(tensors):
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    verify(tensors)
    assert list(tensors) == list(before)
    assert all(torch.equal(tensors[key], before[key]) for key in before)


# ---- the specification --------------------------------------------------------------------------


def example_from_specification() -> dict[str, bytes]:
    text = Path(native.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^`(base_model\.model\.[^`]+)`:.*?^```hex\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return {key: bytes.fromhex(block) for key, block in blocks}


def test_the_example_in_the_specification():
    delta = SparseDelta(support(3, 4, 9, 20), torch.tensor([1.0, -0.5, 0.25, 2.0]), (4, 8))
    tensors = native.build({"layer.weight": delta}, {"head.bias": torch.tensor([0.0, 1.0])})
    written = {key: tensor.view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items()}
    assert written == example_from_specification()


def test_the_example_can_be_read():
    blocks = example_from_specification()
    tensors = {key: torch.frombuffer(bytearray(block), dtype=torch.uint8) for key, block in blocks.items()}
    for key in ("base_model.model.layer.sparse_ft_weight.values", "base_model.model.head.bias"):
        tensors[key] = tensors[key].view(torch.float32)
    found = native.verify(tensors)["layer.weight"]
    assert found.to_dense().nonzero().tolist() == [[0, 3], [0, 4], [1, 1], [2, 4]]
    assert found.to_dense()[2, 4] == 2.0


# ---- files --------------------------------------------------------------------------------------


def test_files_are_checked_before_loading(tensors, tmp_path):
    path = tmp_path / native.SOURCE
    verify_before_loading(tmp_path, COUNTS)  # no weights here: PEFT's own error is the clearer one
    save_file(tensors, path)
    assert_same(verify_before_loading(tmp_path, COUNTS).deltas, deltas())
    verify_before_loading(tmp_path.parent, COUNTS, subfolder=tmp_path.name)
    for counts in ({**COUNTS, QUERY: 4}, {QUERY: 3}):
        with pytest.raises(FormatError, match=f"{re.escape(str(path))}: tensor.*counts"):
            verify_before_loading(tmp_path, counts)
    assert sorted(load_file(path)) == sorted(tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=rf"{re.escape(str(path))} is not a readable safetensors file"):
        verify_before_loading(tmp_path, COUNTS)
