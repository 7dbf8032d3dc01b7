"""The native adapter file: names, digest and checks, as pure functions over dictionaries of tensors (FORMAT.md)."""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.delta import SparseDelta
from ..core.gaps import decode_gaps, encode_gaps
from ..core.names import PREFIX, unwrapped, without_adapter
from ..errors import FormatError

DIGEST_KEY = "sparse_ft_digest"
VERSION = 1
SOURCE = "adapter_model.safetensors"

VALUES, INDICES = "values", "_extra_state"
_PARTS = {"sparse_ft_weight": "weight", "sparse_ft_bias": "bias"}
_MAGIC = b"PSFT"
_DIGEST_SIZE = 32
_HEADER_SIZE = 8
_REMEDY = "Nothing was loaded. Download the adapter again, or save it again from the model that trained it."
_RESEAL = "Tensors edited on purpose need a new digest: peft_sparse.checkpoints.native.finish(state_dict)."

# The spelling of safetensors, so that the digest can be recomputed from a file without torch.
_DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Names


def canonical_name(key: str, *, adapter_name: str | None = None) -> str:
    """The name of a tensor that is the same in a PeftModel, in a transformers model, under FSDP and in the file.

    Args:
        key: key of a state dict, with or without PEFT's prefix `base_model.model.`.
        adapter_name: the adapter whose name stands in the key; None for checkpoint keys, which have none.
    """
    name = unwrapped(key) if adapter_name is None else without_adapter(key, adapter_name)
    return name.removeprefix(PREFIX)


def tensor_names(parameter: str) -> tuple[str, str]:
    """Canonical names of the two tensors, values and coded indices, that hold the delta of a base-model parameter."""
    module, _, part = parameter.rpartition(".")
    stem = f"{module}.sparse_ft_{part}" if module else f"sparse_ft_{part}"
    return f"{stem}.{VALUES}", f"{stem}.{INDICES}"


def parameter_of(name: str) -> str | None:
    """The base-model parameter that a canonical tensor name belongs to; None for tensors that are not a delta's."""
    *module, part, kind = ("", *name.split("."))
    if part not in _PARTS or kind not in (VALUES, INDICES):
        return None
    return ".".join([*module, _PARTS[part]]).removeprefix(".")


def _canonical(tensors: Mapping[str, Tensor], adapter_name: str | None, source: str) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = canonical_name(key, adapter_name=adapter_name)
        if name in named:
            raise FormatError(f"{source}: tensor '{name}' occurs twice (again as '{key}'). {_REMEDY}")
        named[name] = tensor
    return named


# Writing


def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """BLAKE2b-256 over names, dtypes, shapes and bytes of some tensors.

    Independent of the order of the dictionary, the device and the memory layout; bytes are little-endian.

    Args:
        tensors: by canonical name (`canonical_name`).

    Returns:
        [32] uint8.

    Raises:
        FormatError: a tensor without data (meta device) or with a dtype that safetensors cannot store.

    Cost: one pass over the bytes on the CPU, about one second per gigabyte.
    """
    state = hashlib.blake2b(digest_size=_DIGEST_SIZE, person=b"peft_sparse")
    for name in sorted(tensors, key=lambda text: text.encode()):
        tensor = tensors[name]
        encoded, code = name.encode(), _dtype_code(name, tensor).encode()
        state.update(struct.pack("<I", len(encoded)) + encoded)
        state.update(struct.pack("<B", len(code)) + code)
        state.update(struct.pack(f"<B{tensor.dim()}Q", tensor.dim(), *tensor.shape))
        state.update(_little_endian(tensor))
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)


def _dtype_code(name: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        raise FormatError(f"tensor '{name}' has no data (meta device): load or gather the weights before saving them")
    if tensor.dtype not in _DTYPE_CODES:
        known = sorted(_DTYPE_CODES.values())
        raise FormatError(f"tensor '{name}' has dtype {tensor.dtype}; an adapter file holds only {known}")
    return _DTYPE_CODES[tensor.dtype]


def _little_endian(tensor: Tensor) -> bytes:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw = flat.view(torch.uint8).reshape(flat.numel(), flat.element_size())
    return (raw if sys.byteorder == "little" else raw.flip(1)).numpy().tobytes()


def finish(
    state: Mapping[str, Tensor],
    heads: Mapping[str, Tensor] | None = None,
    *,
    adapter_name: str | None = None,
    values_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Complete what is about to be saved: values in the dtype of the file, and the digest.

    Args:
        state: the delta tensors (values and coded indices) under model keys or checkpoint keys, and possibly heads; a
            digest that it already holds is replaced.
        heads: fully trained tensors (`modules_to_save`) that PEFT itself adds to the file: covered by the digest, not
            part of the result.
        adapter_name: the adapter whose name stands in the keys; None for checkpoint keys.
        values_dtype: dtype of the values in the file; None leaves them as they are.

    Returns:
        `state` plus the digest, whose key carries PEFT's prefix if the other keys do.
    """
    finished: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = canonical_name(key, adapter_name=adapter_name)
        if name == DIGEST_KEY:
            continue
        is_values = parameter_of(name) is not None and name.endswith(f".{VALUES}")
        finished[key] = tensor.to(values_dtype) if is_values and values_dtype is not None else tensor
    covered = _canonical({**finished, **(heads or {})}, adapter_name, "the state dict")
    others = sorted(name for name in covered if parameter_of(name) is None)
    payload = _MAGIC + bytes([VERSION, 0, 0, 0]) + bytes(digest(covered).tolist()) + "\n".join(others).encode()
    prefix = PREFIX if any(key.startswith(PREFIX) for key in (*finished, *(heads or {}))) else ""
    finished[prefix + DIGEST_KEY] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    return finished


def build(
    deltas: Mapping[str, SparseDelta],
    heads: Mapping[str, Tensor] | None = None,
    *,
    values_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The whole content of an adapter file, from deltas that live in no model (imports, extraction, composition).

    Args:
        deltas: by name of the parameter in the base model, such as `model.layers.0.self_attn.q_proj.weight`.
        heads: fully trained tensors by name in the base model.
        values_dtype: dtype of the values in the file; None leaves them as they are.

    Returns:
        tensors by checkpoint key, ready for `safetensors.torch.save_file` and for `verify`.
    """
    tensors = {PREFIX + name: tensor for name, tensor in (heads or {}).items()}
    for parameter, delta in deltas.items():
        values, indices = tensor_names(parameter)
        tensors[PREFIX + values] = delta.values.detach().contiguous()
        tensors[PREFIX + indices] = encode_gaps(delta.indices, delta.shape)
    return finish(tensors, values_dtype=values_dtype)


# Reading


class Verified:
    """A file that was checked and decoded already, for the one loading that follows.

    Copies are the same object and pickles are empty, so that a config that holds it stays small.

    Attributes:
        deltas: what `verify` gave; None once they were taken.
        digest: the digest that was recomputed from the file's tensors.
    """

    def __init__(self, deltas: dict[str, SparseDelta] | None = None, digest: bytes = b"") -> None:
        self.deltas, self.digest = deltas, digest

    def take(self) -> tuple[dict[str, SparseDelta] | None, bytes]:
        """The deltas and the digest, once."""
        deltas, self.deltas = self.deltas, None
        return deltas, self.digest

    def __deepcopy__(self, memo: object) -> Verified:
        return self

    def __reduce__(self) -> tuple[type[Verified], tuple[()]]:
        return Verified, ()


def verify(
    tensors: Mapping[str, Tensor],
    *,
    counts: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    passengers: Collection[str] | None = None,
    vocabularies: Collection[str] = (),
    adapter_name: str | None = None,
    source: str = SOURCE,
    verified: Verified | None = None,
) -> dict[str, SparseDelta]:
    """Check a whole adapter and decode it; nothing is modified.

    Args:
        tensors: everything that the file holds, under checkpoint keys, or under model keys if `adapter_name` is given.
        counts: tuned weights by parameter, as adapter_config.json says; None takes the file's own.
        shapes: shape of every parameter that the adapter tunes in this model; None accepts any shape.
        heads: shapes of the tensors of `modules_to_save` in this model, by canonical name; None accepts any.
        passengers: canonical names of tensors that may travel along outside the digest, which PEFT's
            `save_embedding_layers` adds after the digest was made; None accepts any.
        vocabularies: parameters with a row for each token. The model may have more rows of them than the file knows:
            flat row-major indices mean the same weights there.
        adapter_name: the adapter whose name stands in the keys; None for checkpoint keys.
        source: what errors call the file.
        verified: what an earlier check of the same file found. If the tensors still have its digest they are not
            decoded again.

    Returns:
        the deltas by parameter name, on the CPU, values in the file's dtype.

    Raises:
        FormatError: anything does not fit; the message names the tensor, the rule and the way out.
    """
    named = _canonical(tensors, adapter_name, source)
    version, expected_digest, others = _parse_digest(named.pop(DIGEST_KEY, None), source)
    covered = {name: named[name] for name in named if parameter_of(name) is not None or name in others}
    for name in sorted(others - set(named)):
        raise FormatError(f"{source}: tensor '{name}' is missing. {_REMEDY}")
    _check_surplus(set(named) - set(covered), passengers, source)
    _refuse_views(named, source)
    known, known_digest = (None, b"") if verified is None else verified.take()
    found_digest = bytes(digest(covered).tolist()) if known is not None else None
    deltas = known if known is not None and found_digest == known_digest else _READERS[version](covered, source)
    # What does not fit the model or the config is told before the digest: it names the tensor, the digest cannot.
    _check_names(deltas, counts, "adapter_config.json ('counts')", source)
    _check_names(deltas, shapes, "the model", source)
    _check_counts(deltas, counts or {}, source)
    _check_shapes(deltas, shapes or {}, vocabularies, source)
    if heads is not None:
        _check_heads({name: named[name] for name in others}, heads, source)
    if (found_digest or bytes(digest(covered).tolist())) != expected_digest:
        raise FormatError(f"{source}: '{DIGEST_KEY}' does not fit the tensors, which have changed. {_REMEDY} {_RESEAL}")
    return deltas


def _parse_digest(tensor: Tensor | None, source: str) -> tuple[int, bytes, set[str]]:
    """Version of the file, digest, and names of the covered tensors that are not a delta's."""
    if tensor is None:
        raise FormatError(f"{source}: tensor '{DIGEST_KEY}' is missing. {_REMEDY} {_RESEAL}")
    payload = _little_endian(tensor)
    is_ours = tensor.dtype == torch.uint8 and tensor.dim() == 1 and payload.startswith(_MAGIC)
    if not is_ours or len(payload) < _HEADER_SIZE:
        raise FormatError(f"{source}: tensor '{DIGEST_KEY}' is not the digest of an adapter of peft_sparse. {_REMEDY}")
    version = payload[len(_MAGIC)]
    if version not in _READERS:
        known = ", ".join(map(str, _READERS))
        raise FormatError(
            f"{source}: '{DIGEST_KEY}' says format version {version}, this peft_sparse reads {known}. "
            "Upgrade it with: pip install -U peft-sparse"
        )
    names_at = _HEADER_SIZE + _DIGEST_SIZE
    if len(payload) < names_at or any(payload[len(_MAGIC) + 1 : _HEADER_SIZE]):
        raise FormatError(f"{source}: the header of '{DIGEST_KEY}' is damaged. {_REMEDY}")
    try:
        names = payload[names_at:].decode().split("\n") if len(payload) > names_at else []
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: the names in '{DIGEST_KEY}' are damaged ({error}). {_REMEDY}") from error
    if names != sorted(set(names)):
        raise FormatError(f"{source}: the names in '{DIGEST_KEY}' must be sorted and unique. {_REMEDY}")
    return version, payload[_HEADER_SIZE:names_at], set(names)


def stored_digest(tensor: Tensor, *, source: str = SOURCE) -> str:
    """The digest that a file carries, in hexadecimal: what tells one adapter from another.

    Args:
        tensor: the file's tensor `DIGEST_KEY`.
        source: what errors call the file.

    Raises:
        FormatError: the tensor is none of ours.
    """
    return _parse_digest(tensor, source)[1].hex()


def digest_of(tensors: Mapping[str, Tensor], *, source: str = SOURCE) -> str:
    """The digest that a file of these tensors carries, see `stored_digest`."""
    return stored_digest(next(t for key, t in tensors.items() if canonical_name(key) == DIGEST_KEY), source=source)


def _read_version_1(named: Mapping[str, Tensor], source: str) -> dict[str, SparseDelta]:
    deltas: dict[str, SparseDelta] = {}
    for parameter in sorted({parameter for name in named if (parameter := parameter_of(name)) is not None}):
        values_name, indices_name = tensor_names(parameter)
        for name in (values_name, indices_name):
            if name not in named:
                raise FormatError(f"{source}: tensor '{name}' is missing. {_REMEDY}")
        values, coded = named[values_name].detach().cpu(), named[indices_name].detach().cpu()
        _check_values(values, values_name, source)
        if coded.dtype != torch.uint8 or coded.dim() != 1:
            found = f"got {coded.dtype} of shape {tuple(coded.shape)}"
            raise FormatError(f"{source}: tensor '{indices_name}' must be one-dimensional uint8, {found}. {_REMEDY}")
        indices, shape = decode_gaps(coded, name=f"'{indices_name}' of {source}", count=values.numel())
        deltas[parameter] = SparseDelta(indices, values, tuple(shape))
    return deltas


_READERS: dict[int, Callable[[Mapping[str, Tensor], str], dict[str, SparseDelta]]] = {1: _read_version_1}


def _refuse_views(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that claim more numbers than they hold bytes for, as a pickled one can: reading takes them all."""
    for name, tensor in tensors.items():
        held = tensor.untyped_storage().nbytes() if not tensor.is_meta and tensor.layout == torch.strided else None
        if held is not None and tensor.numel() * tensor.element_size() > held and not hasattr(tensor, "full_tensor"):
            raise FormatError(
                f"{source}: tensor '{name}' claims the shape {tuple(tensor.shape)} and has {held} bytes. {_REMEDY}"
            )


def _check_values(values: Tensor, name: str, source: str) -> None:
    if values.dtype not in _VALUE_DTYPES or values.dim() != 1:
        found = f"{values.dtype} of shape {tuple(values.shape)}"
        rule = "one-dimensional float32, bfloat16, float16 or float64"
        raise FormatError(f"{source}: tensor '{name}' must be {rule}, got {found}. {_REMEDY}")
    # A digest can be right and the run that wrote the file diverged: one such weight makes every output NaN.
    if broken := int((~values.isfinite()).sum()):
        raise FormatError(
            f"{source}: tensor '{name}' holds {broken} values that are NaN or infinite, so the run that saved it had "
            "diverged. Nothing was loaded. Load an earlier checkpoint, or train again with a smaller learning rate."
        )


def _check_surplus(names: Iterable[str], allowed: Collection[str] | None, source: str) -> None:
    for name in sorted(names):
        if allowed is not None and name not in allowed:
            raise FormatError(f"{source}: tensor '{name}' has no place in this model. {_REMEDY}")


def _check_heads(found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], source: str) -> None:
    _check_surplus(found, expected, source)
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{source}: the head tensor '{name}' of this model is missing. {_REMEDY}")
        if found[name].shape != tuple(shape):
            sizes = f"has shape {tuple(found[name].shape)} in the file and {tuple(shape)} in this model"
            raise FormatError(
                f"{source}: the head tensor '{name}' {sizes}. Nothing was loaded. Build the base model as in training "
                "(for a classifier, with the same num_labels; for a vocabulary, by resize_token_embeddings first)."
            )


def _check_names(found: Mapping[str, object], expected: Mapping[str, object] | None, owner: str, source: str) -> None:
    if expected is None:
        return
    for parameter in sorted(expected.keys() - found.keys()):
        name = tensor_names(parameter)[0]
        raise FormatError(f"{source}: tensor '{name}' is missing, which {owner} asks for. {_REMEDY}")
    for parameter in sorted(found.keys() - expected.keys()):
        reason = f"is surplus: {owner} has no tuned parameter '{parameter}'"
        raise FormatError(f"{source}: tensor '{tensor_names(parameter)[0]}' {reason}. {_REMEDY}")


def _check_counts(deltas: Mapping[str, SparseDelta], counts: Mapping[str, int], source: str) -> None:
    for parameter, count in counts.items():
        if deltas[parameter].count != count or isinstance(count, bool):
            raise FormatError(
                f"{source}: tensor '{tensor_names(parameter)[0]}' holds {deltas[parameter].count} weights, but "
                f"adapter_config.json ('counts') says {count!r}. {_REMEDY}"
            )


def _check_shapes(
    deltas: Mapping[str, SparseDelta], shapes: Mapping[str, Sequence[int]], vocabularies: Collection[str], source: str
) -> None:
    for parameter, shape in shapes.items():
        delta = deltas[parameter]
        if delta.shape == tuple(shape):
            continue
        way_out = (
            "Load the base model that the adapter was trained on (base_model_name_or_path in adapter_config.json)."
        )
        if parameter in vocabularies and delta.shape[1:] == tuple(shape[1:]):
            if delta.shape[0] < shape[0]:
                continue
            lost = int((delta.indices.long() >= math.prod(shape)).sum())
            way_out = (
                f"{lost:,} of its {delta.count:,} tuned weights are in rows that this model lacks: give it the rows "
                f"first, resize_token_embeddings({delta.shape[0]})."
            )
        raise FormatError(
            f"{source}: tensor '{tensor_names(parameter)[1]}' was made for a parameter of shape {delta.shape}, but "
            f"'{parameter}' of this model has {tuple(shape)}. Nothing was loaded. {way_out}"
        )
