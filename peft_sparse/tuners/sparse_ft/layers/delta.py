"""The trainable part of one adapter on one tensor: values, and the indices that they belong to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....core.delta import SparseDelta
from ....core.gaps import decode_gaps, encode_gaps
from ....core.indices import check_indices, checksum, index_dtype
from ....core.observer import GradientObserver, receive_whole
from ....core.sharded import ObjectTensor, is_sharded, overwrite, sharded_like, whole
from ....core.traced import Viewer
from ....errors import ConfigError, FormatError, SelectionError
from ....optim import l1 as regularization
from ...common.base_module import NeverOffloaded
from ...common.events import ON_UNFINISHED, announce
from ...common.kept_dtype import undo_cast
from .. import unselected

# Attribute of a coded support that was checked and decoded already.
_SUPPORT = "_peft_sparse_support"


def with_support(coded: Tensor, indices: Tensor) -> Tensor:
    """A coded support, the same memory, that brings its checked indices along."""
    coded = coded.detach()
    setattr(coded, _SUPPORT, indices)
    return coded


class Meter(Protocol):
    """Sees the inputs of a layer."""

    def see(self, x: Tensor) -> None:
        """Take the inputs [..., I] of one forward."""


class AdapterDelta(NeverOffloaded):
    """One adapter's delta on one tensor of a layer.

    `state_dict` carries the indices gap-coded as torch's extra state. transformers' own loader calls none of PEFT's
    hooks, and extra state is the one thing it hands to the module itself.

    Args:
        shape: shape of the tuned tensor.
        count: number of tuned weights; their indices are unset (0, 1, 2, ...) until `set_support` or a load.
        dtype: dtype of the values. `Module.to(dtype)`, `half()` and their like change it; an assignment to
            `values.data` does not, see `keep_dtype`.
        device: where values and indices live.

    Attributes:
        values: [k] trainable.
        values_dtype: what dtype they are meant to have.
        indices: [k] buffer, flat row-major, sorted and unique; int32, or int64 for tensors of 2**31 elements and more.
        support_version: grows whenever the indices change.
        l1_coefficient: lambda/N, what `penalise` set.
        observer: who else sees the tensor's gradient while this delta is active, if anyone. Nobody while the values are
            frozen.
        meter: sees the inputs of the layer in training forwards while its steps are being fitted, else None.
        gradient_viewer, input_viewer: through which graphs of torch.compile show these two what they see; None where
            there is nobody.
        wakes_driver: whether trainers have to know when its values are let train: see `drivers.Driver`.
        selection: shared by the deltas of an adapter whose weights were yet to be selected or loaded when it was made,
            else None.
        parameter_name: of the tuned tensor, where there is a selection.
    """

    indices: Tensor
    wakes_driver = False
    selection: unselected.Selection | None = None
    parameter_name = ""

    def __init__(self, shape: tuple[int, ...], count: int, *, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self._shards: list[nn.Parameter] = []
        self.shape = tuple(shape)
        self.values = nn.Parameter(torch.zeros(count, dtype=dtype, device=device))
        self.values_dtype = dtype
        self._own_values = weakref.ref(self.values)
        indices = torch.arange(count, dtype=index_dtype(self.numel), device=device)
        self.register_buffer("indices", indices, persistent=False)
        self.support_version = 0
        # Of a copy: the version of its indices that was looked at last, and their checksum.
        self._copied: tuple[int, Tensor] | None = None
        self.l1_coefficient = 0.0
        self._observer: GradientObserver | None = None
        self._meter: Meter | None = None
        self.gradient_viewer: Viewer | None = None
        self.input_viewer: Viewer | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 exchanges the parameter: in a forward or backward pass it is all there, between them in shards.
        if name == "values" and is_sharded(value):
            self._shards = [value]
        super().__setattr__(name, value)
        if name == "_hf_hook":
            self._own_values = weakref.ref(self.values)

    @property
    def observer(self) -> GradientObserver | None:
        return self._observer if self._observer is not None and self.values.requires_grad else None

    @observer.setter
    def observer(self, observer: GradientObserver | None) -> None:
        self._observer = observer
        self.gradient_viewer = None if observer is None else Viewer(partial(receive_whole, observer))

    @property
    def meter(self) -> Meter | None:
        return self._meter

    @meter.setter
    def meter(self, meter: Meter | None) -> None:
        self._meter = meter
        self.input_viewer = None if meter is None else Viewer(meter.see)

    @property
    def held_values(self) -> nn.Parameter:
        """The parameter that optimizers hold: `values`, or what takes its place outside of FSDP2's passes."""
        if self._shards:
            return self._shards[0]
        # `self.values` is slow, and every step asks every delta several times.
        values = self._parameters.get("values")
        return self.values if values is None else values  # type: ignore[return-value]

    @property
    def numel(self) -> int:
        """Number of elements of the tuned tensor."""
        return prod(self.shape)

    @property
    def count(self) -> int:
        """k, the number of tuned weights."""
        values = self._parameters.get("values")
        return (self.values if values is None else values).numel()

    @property
    def takes_part(self) -> bool:
        """Whether a forward has to know of this delta: it holds weights, is watched, or DDP waits for its gradient."""
        if self.count or self.observer is not None:
            return True
        if self._shards:
            # FSDP2 skips what has no gradient, and cannot cut up an empty one.
            return False
        return (
            bool(self.support_version) and self.values.requires_grad and dist.is_available() and dist.is_initialized()
        )

    @property
    def delta(self) -> SparseDelta:
        """The delta as plain tensors, sharing memory with this module; gathered by every process if it is sharded."""
        return SparseDelta(self.indices, whole(self.values), self.shape)

    def set_support(self, indices: Tensor, values: Tensor | None = None) -> None:
        """Put the adapter on other weights, keeping the identity of the parameter `values`.

        Args:
            indices: [k] flat row-major, sorted and unique, in the dtype of `index_dtype(numel)`.
            values: [k]; zeros if None.

        Raises:
            ValueError: the indices do not fit the tensor, or the values do not fit the indices.
            ConfigError: another number of weights than before, and FSDP2 has sharded the values.
        """
        check_indices(indices, self.numel, name=f"a tensor of shape {self.shape}")
        if values is not None and values.shape != indices.shape:
            raise ValueError(
                f"values must have one entry per index, got {tuple(values.shape)} for {tuple(indices.shape)} indices"
            )
        if values is None:
            values = torch.zeros(indices.numel())
        if self._shards:
            self._overwrite_shards(values)
            self._set_indices(indices.to(self.indices.device, copy=True))
            return
        device = self.indices.device if self.values.is_meta else self.values.device
        self._exchange_data(values.detach().to(device=device, dtype=self.values_dtype, copy=True))
        self._set_indices(indices.to(device, copy=True))

    def _exchange_data(self, data: Tensor) -> None:
        """Give the parameter other data, of any size. It stays the one that optimizers and others hold."""
        self.values.grad = None
        if data.shape != self.values.shape and not self.values.is_meta:
            # A graph that is still alive makes later ones expect gradients of the old shape. Torch forgets that when it
            # sees another dtype, and not when it sees another shape.
            other = torch.float32 if self.values.dtype == torch.float64 else torch.float64
            self.values.data = self.values.data.new_empty(0, dtype=other)
        self.values.data = data

    def check_number(self, count: int) -> None:
        """Refuse another number of weights than now where that cannot change.

        Raises:
            ConfigError: FSDP2 has sharded the values.
        """
        if self._shards and count != self.count:
            raise ConfigError(
                f"the values must keep their number, {self.count}, while FSDP2 shards them; got {count}. "
                "Select or load the weights first, and call fully_shard after that."
            )

    def _overwrite_shards(self, values: Tensor) -> None:
        self.check_number(values.numel())
        values = values.detach().to(self.values.dtype)
        self.held_values.grad = None
        overwrite(self.held_values, values)
        if not is_sharded(self.values):
            overwrite(self.values, values.to(self.values.device))

    def _set_indices(self, indices: Tensor) -> None:
        self.indices = indices
        self.support_version += 1
        self._copied = None
        if self.selection is not None and indices.numel():
            self.selection.note(self.parameter_name, indices.numel())
        self._own_values = weakref.ref(self.values)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keep_dtype(self, *, in_forward: bool = False) -> None:
        """Give the values their dtype back if they were cast by an assignment to `values.data`: see `undo_cast`.

        Tensors that FSDP puts in the place of the parameter are left alone.
        """
        if not self._was_cast():
            return
        undo_cast(self.values, self.values_dtype, what="The values of a sparse adapter", in_forward=in_forward)

    def _was_cast(self) -> bool:
        values = self.values
        return values.dtype != self.values_dtype and self._own_values() is values and not hasattr(values, "ds_id")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterDelta:
        before = self.values.dtype
        self.check_support()
        super()._apply(fn, recurse)
        if self._copied is not None and not self.indices.is_meta:
            self._copied = self.indices._version, self._copied[1]
        if self.values.dtype != before:
            self.values_dtype = self.values.dtype
        return self

    @property
    def is_unset(self) -> bool:
        """Whether there are values whose indices nobody has ever set, so that they are 0, 1, 2, ..."""
        return not self.support_version and bool(self.count) and not self.held_values.is_meta

    def await_selection(self, selection: unselected.Selection, parameter_name: str) -> None:
        """Say, when training starts before a selection is made or a file is loaded, that there is nothing to train.

        Args:
            selection: what the deltas of the adapter share.
            parameter_name: of the tuned tensor.
        """
        self.selection, self.parameter_name = selection, parameter_name
        unselected.unselected.add(self)
        if not selection.awaits_file:
            announce(ON_UNFINISHED)

    def penalise(self, l1_coefficient: float) -> None:
        """Add l1_coefficient * sum |values| to what every optimizer that holds the values minimises."""
        self.l1_coefficient = l1_coefficient
        if l1_coefficient:
            regularization.penalised.add(self)
        else:
            regularization.penalised.discard(self)

    def pulls(self) -> Iterator[regularization.Pull]:
        """The L1 penalty on the values."""
        yield regularization.Pull(self.held_values, self.l1_coefficient)

    def __getstate__(self) -> dict[str, Any]:
        # Whoever observes says for itself whether it goes along.
        return {**{key: value for key, value in vars(self).items() if key != "_own_values"}, "_observer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, or an unpickled model, is penalised like what it was made from.
        super().__setstate__(state)
        self._own_values = weakref.ref(self.values)
        self._copied = None if self.indices.is_meta else (self.indices._version, checksum(self.indices))
        if self.l1_coefficient:
            regularization.penalised.add(self)
        if self.selection is not None and not self.selection.is_made:
            self.await_selection(self.selection, self.parameter_name)

    def check_support(self) -> None:
        """Refuse a copy whose indices were overwritten in place, while its values stayed what they were.

        `torch.optim.swa_utils.AveragedModel` copies buffers and averages parameters, entry by entry.

        Raises:
            SelectionError: so it was.
        """
        if self._copied is None or self._copied[0] == self.indices._version:
            return
        before = self._copied[1]
        if not torch.equal(before, checksum(self.indices).to(before.device)):
            raise SelectionError(
                "the indices of a copied sparse adapter were overwritten while its values were averaged: values of "
                "different weights are mixed, for the adapter has changed its support since (SpIEL). "
                "torch.optim.swa_utils.AveragedModel and EMA callbacks do so; peft_sparse.AdapterAverage averages by "
                "position, and add_weighted_adapter averages saved adapters."
            )
        self._copied = self.indices._version, before

    def get_extra_state(self) -> Tensor:
        """The indices, gap-coded: uint8 [n] with shape and count in its header."""
        if self.indices.is_meta:
            # Nothing to code: accelerate puts a model there for a moment before it shards it.
            return torch.empty(0, dtype=torch.uint8, device="meta")
        self.check_support()
        coded = encode_gaps(self.indices, self.shape)
        return coded.as_subclass(ObjectTensor) if self._shards else coded

    def set_extra_state(self, state: Tensor) -> None:
        """Decode what `get_extra_state` gave.

        Raises:
            FormatError: the bytes are not a support of this tensor with as many indices as there are values.
        """
        known = getattr(state, _SUPPORT, None)
        if known is not None and known.numel() == self.count:
            self._set_indices(known.to(self.indices.device, copy=True))
            return
        indices, _ = decode_gaps(
            state.cpu(), name=f"a tensor of shape {self.shape}", shape=self.shape, count=self.count
        )
        self._set_indices(indices.to(self.indices.device))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.indices.is_meta:
            del destination[f"{prefix}_extra_state"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        incoming = state_dict.get(f"{prefix}values")
        if incoming is not None and incoming.dim() != 1:
            raise FormatError(f"{prefix}values must be one-dimensional, got shape {tuple(incoming.shape)}")
        if incoming is not None and self._shards and not is_sharded(incoming):
            self._overwrite_shards(incoming)
            state_dict = {**state_dict, f"{prefix}values": sharded_like(incoming, self.held_values)}
        elif incoming is not None and (incoming.shape != self.values.shape or self._was_cast()):
            # The file knows the number of weights, this module only a guess. `.data` keeps the parameter's identity for
            # optimizers.
            dtype = self.values_dtype if self._was_cast() else self.values.dtype
            self._exchange_data(self.values.new_empty(incoming.shape, dtype=dtype))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if self.indices.is_meta and f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")

    def extra_repr(self) -> str:
        return f"shape={self.shape}, count={self.count}, dtype={self.values.dtype}"


def keep_dtypes(deltas: Sequence[AdapterDelta], *, in_forward: bool = False) -> None:
    """Undo casts of their values that nobody asked for: see `AdapterDelta.keep_dtype`."""
    for delta in deltas:
        if delta.values.dtype != delta.values_dtype:
            delta.keep_dtype(in_forward=in_forward)
