"""The native adapter file: names, digest and checks, as pure functions over dictionaries of tensors (FORMAT.md)."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..core.delta import SparseDelta
from ..core.gaps import decode_gaps, encode_gaps
from ..core.names import PREFIX, unwrapped, without_adapter
from ..errors import FormatError
from .native_checks import (
    INDICES,
    REMEDY,
    VALUES,
    check_counts,
    check_heads,
    check_names,
    check_shapes,
    check_surplus,
    check_values,
    refuse_views,
    tensor_names,
)

DIGEST_KEY = "sparse_ft_digest"
VERSION = 1
SOURCE = "adapter_model.safetensors"

_PARTS = {"sparse_ft_weight": "weight", "sparse_ft_bias": "bias"}
_MAGIC = b"PSFT"
_DIGEST_SIZE = 32
_HEADER_SIZE = 8
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


# Names


def canonical_name(key: str, *, adapter_name: str | None = None) -> str:
    """The name of a tensor that is the same in a PeftModel, in a transformers model, under FSDP and in the file.

    Args:
        key: key of a state dict, with or without PEFT's prefix `base_model.model.`.
        adapter_name: the adapter whose name is in the key; None for checkpoint keys, which have none.
    """
    name = unwrapped(key) if adapter_name is None else without_adapter(key, adapter_name)
    return name.removeprefix(PREFIX)


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
            raise FormatError(f"{source}: tensor '{name}' occurs twice (again as '{key}'). {REMEDY}")
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
        adapter_name: the adapter whose name is in the keys; None for checkpoint keys.
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
    extras: Collection[str] | None = None,
    vocabularies: Collection[str] = (),
    left_out: Collection[str] = (),
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
        extras: canonical names of tensors that may travel along outside the digest, which PEFT's
            `save_embedding_layers` adds after the digest was made; None accepts any.
        vocabularies: parameters with a row for each token. The model may have more rows of them than the file knows:
            flat row-major indices mean the same weights there.
        left_out: parameters that the model does not have and need not have. They are checked and not returned.
        adapter_name: the adapter whose name is in the keys; None for checkpoint keys.
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
        raise FormatError(f"{source}: tensor '{name}' is missing. {REMEDY}")
    check_surplus(set(named) - set(covered), extras, source)
    refuse_views(named, source)
    known, known_digest = (None, b"") if verified is None else verified.take()
    found_digest = bytes(digest(covered).tolist()) if known is not None else None
    deltas = known if known is not None and found_digest == known_digest else _READERS[version](covered, source)
    # What does not fit the model or the config is told before the digest: it names the tensor, the digest cannot.
    check_names(deltas, counts, "adapter_config.json ('counts')", source)
    own = {parameter: delta for parameter, delta in deltas.items() if parameter not in left_out}
    check_names(own, shapes, "the model", source)
    check_counts(deltas, counts or {}, source)
    check_shapes(own, shapes or {}, vocabularies, source)
    if heads is not None:
        check_heads({name: named[name] for name in others}, heads, source)
    if (found_digest or bytes(digest(covered).tolist())) != expected_digest:
        raise FormatError(f"{source}: '{DIGEST_KEY}' does not fit the tensors, which have changed. {REMEDY} {_RESEAL}")
    return own


def _parse_digest(tensor: Tensor | None, source: str) -> tuple[int, bytes, set[str]]:
    """Version of the file, digest, and names of the covered tensors that are not a delta's."""
    if tensor is None:
        raise FormatError(f"{source}: tensor '{DIGEST_KEY}' is missing. {REMEDY} {_RESEAL}")
    payload = _little_endian(tensor)
    is_ours = tensor.dtype == torch.uint8 and tensor.dim() == 1 and payload.startswith(_MAGIC)
    if not is_ours or len(payload) < _HEADER_SIZE:
        raise FormatError(f"{source}: tensor '{DIGEST_KEY}' is not the digest of an adapter of peft_sparse. {REMEDY}")
    version = payload[len(_MAGIC)]
    if version not in _READERS:
        known = ", ".join(map(str, _READERS))
        raise FormatError(
            f"{source}: '{DIGEST_KEY}' says format version {version}, this peft_sparse reads {known}. "
            "Upgrade it with: pip install -U peft-sparse"
        )
    names_at = _HEADER_SIZE + _DIGEST_SIZE
    if len(payload) < names_at or any(payload[len(_MAGIC) + 1 : _HEADER_SIZE]):
        raise FormatError(f"{source}: the header of '{DIGEST_KEY}' is damaged. {REMEDY}")
    try:
        names = payload[names_at:].decode().split("\n") if len(payload) > names_at else []
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: the names in '{DIGEST_KEY}' are damaged ({error}). {REMEDY}") from error
    if names != sorted(set(names)):
        raise FormatError(f"{source}: the names in '{DIGEST_KEY}' must be sorted and unique. {REMEDY}")
    return version, payload[_HEADER_SIZE:names_at], set(names)


def stored_digest(tensor: Tensor, *, source: str = SOURCE) -> str:
    """The digest that a file carries, in hexadecimal: what tells one adapter from another.

    Args:
        tensor: the file's tensor `DIGEST_KEY`.
        source: what errors call the file.

    Raises:
        FormatError: the tensor is no digest of this format.
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
                raise FormatError(f"{source}: tensor '{name}' is missing. {REMEDY}")
        values, coded = named[values_name].detach().cpu(), named[indices_name].detach().cpu()
        check_values(values, values_name, source)
        if coded.dtype != torch.uint8 or coded.dim() != 1:
            found = f"got {coded.dtype} of shape {tuple(coded.shape)}"
            raise FormatError(f"{source}: tensor '{indices_name}' must be one-dimensional uint8, {found}. {REMEDY}")
        indices, shape = decode_gaps(coded, name=f"'{indices_name}' of {source}", count=values.numel())
        deltas[parameter] = SparseDelta(indices, values, tuple(shape))
    return deltas


_READERS: dict[int, Callable[[Mapping[str, Tensor], str], dict[str, SparseDelta]]] = {1: _read_version_1}
