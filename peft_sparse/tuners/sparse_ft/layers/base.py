"""What every tuned layer shares: its adapters' deltas, and writing them into the base parameters and out again, bit for
bit.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...._peft_bridge import _get_in_out_features, check_adapters_to_merge
from ....core.observer import GradientObserver, watch_gradient
from ....core.ops import is_recorded
from ....core.overlay import Overlay, add_deltas
from ....core.sharded import how_sharded, is_sharded
from ....core.traced import Viewer, gradient_shown, is_traced
from ...common.base_module import called, loaded
from ...common.events import ON_START, announce
from ...common.layer import PARAMETERS, beyond_range, not_finite, not_whole
from ...common.packed import parameter_device, parameter_shape
from ...common.state_dict_hooks import StateDictHooks
from .active_weights import ActiveWeights
from .bounded_cache import with_entry
from .delta import AdapterDelta, keep_dtypes
from .in_place import WriteLock, Written, flat, is_all_local, written_in_copies
from .moved import MovableLayer


class SparseLayer(MovableLayer):
    """Base class of the tuned layers: holds `AdapterDelta`s per adapter and applies them to the base layer's own
    parameters.

    A subclass says in `_delta_forward` how the layer computes with deltas in it.
    """

    adapter_layer_names = ("sparse_ft_weight", "sparse_ft_bias")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sparse_ft_weight = nn.ModuleDict()
        self.sparse_ft_bias = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # How many `resident` blocks are open: the forward may then write the active deltas into the base weight.
        self.num_resident = 0
        # Held by what writes into the base weight, and by what reads a weight that may be written into.
        self._lock = threading.RLock()
        self._writing = WriteLock(self._lock)
        # Names of parameters that another module shares (tied embeddings): never written in place.
        self.tied_parameters: set[str] = set()
        self._written: dict[str, Written] = {}
        # {parameter: (key of an overlay, the parameter's own entries there)} while `merge_adapter` checks and merges.
        self._checked: dict[str, tuple[tuple[Any, ...], Tensor]] | None = None
        self._overlays: dict[tuple[Any, ...], Overlay] = {}
        self._active: ActiveWeights | None = None
        # {adapter: its deltas alone}, for batches that name an adapter for each example, and of adapters that act
        # together, by their names.
        self._named: dict[str | tuple[str, ...], ActiveWeights] = {}
        self._base_state_hooks = StateDictHooks(self)
        base = self.get_base_layer()
        with warnings.catch_warnings():
            # PEFT does not know norms and says so.
            warnings.simplefilter("ignore")
            self.in_features, self.out_features = _get_in_out_features(base)
        self.num_embeddings = getattr(base, "num_embeddings", None)

    @property
    def is_resident(self) -> bool:
        """Whether the forward may write the active deltas into the base weight (see `resident`)."""
        return self.num_resident > 0

    # ---- adapters --------------------------------------------------------------------------------

    def deltas_of(self, parameter: str) -> nn.ModuleDict:
        """{adapter name: AdapterDelta} of one tensor, "weight" or "bias"."""
        return getattr(self, f"sparse_ft_{parameter}")

    def update_layer(
        self, adapter_name: str, counts: dict[str, int], *, dtype: torch.dtype, inference_mode: bool
    ) -> None:
        """Give this layer a new adapter.

        Args:
            adapter_name: its name.
            counts: {"weight" or "bias": number of weights}; their indices come later.
            dtype: dtype of the values.
            inference_mode: whether the adapter starts frozen.
        """
        base = self.get_base_layer()
        for parameter, count in counts.items():
            shape, device = parameter_shape(base, parameter), parameter_device(base, parameter)
            delta = AdapterDelta(shape, count, dtype=dtype, device=device)
            self._modules[f"sparse_ft_{parameter}"][adapter_name] = delta
        self._forget()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _forget(self) -> None:
        """Give up what was looked up once."""
        self._overlays, self._active, self._named = {}, None, {}

    def active_deltas(self, parameter: str, adapters: Sequence[str] | None = None) -> list[AdapterDelta]:
        """The deltas on one tensor that take part in a forward, of `adapters` (None: the active ones), in order."""
        held = self.deltas_of(parameter)
        names = self.active_adapters if adapters is None else adapters
        return [held[name] for name in names if name in held and held[name].takes_part]

    def all_active_deltas(self) -> list[AdapterDelta]:
        """`active_deltas` of every tensor."""
        return [delta for parameter in PARAMETERS for delta in self.active_deltas(parameter)]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, and which values train (PEFT's method, without walks over single parameters)."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        wakes = False
        for parameter in PARAMETERS:
            for name, delta in self._modules[f"sparse_ft_{parameter}"]._modules.items():
                # None where a library has put something else in the parameter's place, which is its to train.
                values, trains = delta._parameters.get("values"), name in names and not inference_mode
                if values is not None and values.requires_grad is not trains and values.is_leaf:
                    values.requires_grad_(trains)
                    wakes |= trains and delta.wakes_driver
        self._active_adapter = names
        if wakes:
            announce(ON_START)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or let them train (PEFT's method)."""
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        held = [self._modules[f"sparse_ft_{parameter}"]._modules for parameter in PARAMETERS]
        if requires_grad and any(deltas[name].wakes_driver for deltas in held for name in names & deltas.keys()):
            announce(ON_START)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, out of the base parameters first if it is there."""
        if not self.merged:
            self.restore()
        super().delete_adapter(adapter_name)
        self._forget()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the weight's dtype, which would round float32 values over a bfloat16 weight.
        for parameter in PARAMETERS:
            if adapter_name in self.deltas_of(parameter):
                target = device if device is not None else parameter_device(self.get_base_layer(), parameter)
                delta = self.deltas_of(parameter)[adapter_name]
                if not delta.values.is_meta:
                    delta.to(target)

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.moved is not None and self.is_as_before(self.active_adapters):
            return called(self.get_base_layer(), self._forward_as_before, (x, *args), kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            self.restore()
            return self._untuned(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        deltas = self.all_active_deltas()
        if not deltas:
            self.restore()
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            for delta in deltas:
                delta.check_support()
        if torch.is_grad_enabled():
            keep_dtypes(deltas, in_forward=True)
        return called(self.get_base_layer(), partial(self._delta_forward, self.active_adapters), (x, *args), kwargs)

    def _untuned(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the wrapped layer computes without the adapters, of which nothing is written now."""
        return self.base_layer(x, *args, **kwargs)

    def keep_dtypes(self) -> None:
        """Undo casts of the active adapters' values that nobody asked for: see `AdapterDelta.keep_dtype`."""
        keep_dtypes(self.all_active_deltas())

    def acts(self, adapter_name: str) -> bool:
        return any(self.active_deltas(parameter, [adapter_name]) for parameter in PARAMETERS)

    def maker(self, parameter: str, adapters: Sequence[str]) -> Callable[[], Tensor]:
        deltas = self.active_deltas(parameter, adapters)
        values = [(d.values, d.indices) for d in deltas]
        observers = [d.observer for d in deltas if d.observer is not None and not is_recorded()]
        viewers = [d.gradient_viewer for d in deltas if d.observer is not None and is_traced()]
        return partial(self._with_deltas, partial(self.base_under, parameter, adapters), values, observers, viewers)

    @staticmethod
    def _with_deltas(
        base: Callable[[], Tensor],
        deltas: Sequence[tuple[Tensor, Tensor]],
        observers: Sequence[GradientObserver],
        viewers: Sequence[Viewer | None],
    ) -> Tensor:
        result = add_deltas(base(), deltas) if deltas else base()
        watch_gradient(result, observers)
        for viewer in viewers:
            result = gradient_shown(result, viewer.number)  # type: ignore[union-attr]
        return result

    def leaves(self, parameter: str, adapters: Sequence[str]) -> list[Tensor]:
        return [delta.values for delta in self.active_deltas(parameter, adapters)]

    def base_tensor(self, parameter: str) -> Tensor | None:
        """The base layer's own tensor without any delta, dequantised if need be; None if it has none."""
        return self.pristine(parameter)

    # ---- writing into the base parameters --------------------------------------------------------

    def overlay(self, parameter: str, adapters: Sequence[str]) -> tuple[tuple[Any, ...], Overlay]:
        """The union of the adapters' supports on one tensor, and a key that changes when any support does."""
        deltas = self.active_deltas(parameter, adapters)
        for delta in deltas:
            delta.check_support()
        key = (parameter, *((id(d), d.support_version, d.indices.device) for d in deltas))
        found = self._overlays.get(key)
        if found is None:
            found = Overlay([d.indices for d in deltas])
            own = [k for k in self._overlays if k[0] == parameter]
            self._overlays = with_entry(self._overlays, key, found, counted=own)
        return key, found

    def pristine(self, parameter: str) -> Tensor:
        written = self._written.get(parameter)
        if written is None:
            return getattr(self.get_base_layer(), parameter)
        if written.parameter is not None:
            return written.parameter
        with self._lock:
            copy = getattr(self.get_base_layer(), parameter).detach().clone()
            written = self._written.get(parameter)
            if written is not None:
                flat(copy)[written.overlay.indices] = written.originals.to(device=copy.device, dtype=copy.dtype)
            return copy

    def pristine_entries(self, parameter: str, overlay: Overlay) -> Tensor:
        """[u] the parameter's own entries at the overlay's indices, whatever is written into it now."""
        return overlay.take(flat(self.base_tensor(parameter)))

    def write(self, parameter: str, adapters: Sequence[str]) -> None:
        """Put the adapters' deltas into the base parameter, or bring what is there up to date."""
        values = [d.values for d in self.active_deltas(parameter, adapters)]
        if values:
            self.write_entries(parameter, *self.overlay(parameter, adapters), values)
        else:
            self.restore(parameter)

    def write_entries(self, parameter: str, key: tuple[Any, ...], overlay: Overlay, values: Sequence[Tensor]) -> None:
        """`write` for what `overlay` gave, and one tensor of values for each of its deltas."""
        base = self.get_base_layer()
        with self._writing:
            written, now = self._written.get(parameter), getattr(base, parameter)
            if written is None or written.key != key or (written.target is not None and written.target is not now):
                self.restore(parameter)
                self._base_state_hooks.keep(parameter)
                written = self._begin_write(parameter, key, overlay)
            own = written.parameter
            originals = written.originals if own is None else flat(own)[overlay.indices]
            overlay.write_(flat(getattr(base, parameter)), values, originals=originals)

    def _begin_write(self, parameter: str, key: tuple[Any, ...], overlay: Overlay) -> Written:
        base = self.get_base_layer()
        own = getattr(base, parameter)
        if parameter in self.tied_parameters:
            written = Written(key, overlay, parameter=own)
            setattr(base, parameter, nn.Parameter(own.detach().clone(), requires_grad=False))
        else:
            checked, entries = (self._checked or {}).get(parameter, (None, None))
            if entries is None or checked != key:
                entries = self.pristine_entries(parameter, overlay)
            written = Written(key, overlay, originals=entries, shape=tuple(own.shape), target=own)
        self._written[parameter] = written
        self._base_state_hooks.begin()
        return written

    def restore(self, parameter: str | None = None) -> None:
        """Take whatever is written out of the base parameters (of one, or of all), bit for bit."""
        if not self._written:
            return
        with self._writing:
            for name in PARAMETERS if parameter is None else (parameter,):
                self._restore(name, self._written.pop(name, None))
            if not self._written:
                self._base_state_hooks.end()

    def _restore(self, name: str, written: Written | None) -> None:
        if written is None:
            return
        if written.parameter is not None:
            setattr(self.get_base_layer(), name, written.parameter)
            return
        own = getattr(self.get_base_layer(), name)
        if written.target is not own and is_all_local(written.target, written.shape):
            # Another tensor has taken its place (torch.func.functional_call, a parameter assigned by the user).
            own = written.target
        if is_all_local(own, written.shape):
            # Otherwise it stood in a copy that FSDP gathered for a pass and has thrown away since.
            base = flat(own)
            written.overlay.put_(base, written.originals.to(device=base.device, dtype=base.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        # What is moved or cast is the base model, bit for bit, and what undoes a merge goes along with it.
        if not self.merged:
            self.restore()
        for written in self._written.values():
            if written.originals is not None:
                written.originals = fn(written.originals)
        super()._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self) -> SparseLayer:
        # `nn.DataParallel` copies weights first and modules then: what is written stays in the copies. Each is of one
        # forward in one thread, and writes nothing.
        if self._written and (not self.merged or self.disable_adapters):
            raise written_in_copies()
        replica = super()._replicate_for_data_parallel()
        replica._forget()
        replica.num_resident, replica._written = 0, {}
        return replica

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_writing", "_base_state_hooks", "_active", "_named")
        return {key: value for key, value in vars(self).items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is in no `resident` block, and has its own memory.
        super().__setstate__(state)
        self._lock, self._base_state_hooks = threading.RLock(), StateDictHooks(self)
        self._writing = WriteLock(self._lock)
        self._forget()
        self.num_resident, self._checked = 0, None
        if self.merged:
            self._base_state_hooks.begin()
        else:
            self.restore()

    # ---- merging ---------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base parameters until `unmerge`.

        Args:
            safe_merge: check first that the result is finite.
            adapter_names: the adapters to merge; the active ones if None.

        Raises:
            ValueError: `safe_merge` found a NaN or an infinity; the layer is as it was.
            ConfigError: this process holds only a part of the weights.
        """
        is_named = adapter_names is not None
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        present = [name for name in adapter_names if any(name in self.deltas_of(p) for p in PARAMETERS)]
        self.refuse_parts(present)
        if safe_merge:
            self.check_finite([*self.merged_adapters, *present])
        # A layer that has nothing of them is merged all the same: its active adapters, which are others, do not act.
        self.merged_adapters.extend(adapter_names if is_named else present)
        with loaded(self.get_base_layer(), store=True):
            for parameter in PARAMETERS:
                self.write(parameter, self.merged_adapters)

    def refuse_parts(self, adapters: Sequence[str], name: str = "this layer") -> None:
        for parameter in PARAMETERS:
            own = getattr(self.get_base_layer(), parameter, None)
            for delta in self.active_deltas(parameter, adapters):
                how = how_sharded(own)
                if is_sharded(own) or (how is not None and not is_all_local(own, delta.shape)):
                    raise not_whole(f"{parameter} of {name}", how)

    def keep_entries(self, kept: bool) -> None:
        self._checked = {} if kept else None

    def _entries_to_check(self, parameter: str, adapters: Sequence[str]) -> tuple[Tensor, Overlay]:
        key, overlay = self.overlay(parameter, adapters)
        entries = self.pristine_entries(parameter, overlay)
        if self._checked is not None:
            self._checked[parameter] = key, entries
        return entries, overlay

    def check_finite(self, adapters: Sequence[str]) -> None:
        with loaded(self.get_base_layer()):
            for parameter in PARAMETERS:
                values = [delta.values for delta in self.active_deltas(parameter, adapters)]
                if not values:
                    continue
                entries, overlay = self._entries_to_check(parameter, adapters)
                merged = overlay.entries(entries, values)
                if not bool(torch.isfinite(merged).all()):
                    overflows = all(bool(torch.isfinite(v).all()) for v in values)
                    why = f"weight + delta overflows {merged.dtype}" if overflows else "it holds NaN or infinite values"
                    raise not_finite(adapters, why)

    def check_range(self, adapters: Sequence[str]) -> None:
        with loaded(self.get_base_layer()):
            for parameter in PARAMETERS:
                values = [delta.values for delta in self.active_deltas(parameter, adapters)]
                own = self.base_tensor(parameter) if values and self.has_own(parameter) else None
                # What is in parts is refused as such, by the merge.
                if own is None or any(is_sharded(t) or how_sharded(t) is not None for t in [own, *values]):
                    continue
                entries, overlay = self._entries_to_check(parameter, adapters)
                if bool(torch.isfinite(overlay.entries(entries, values)).all()):
                    continue
                if all(bool(torch.isfinite(given).all()) for given in [entries, *values]):
                    raise beyond_range(adapters, parameter, entries.dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's delta on the weight as a dense tensor, zeros where this layer has none of it."""
        base = self.get_base_layer()
        for delta in self.active_deltas("weight", [adapter_name]):
            return delta.delta.to_dense()
        shape, device = parameter_shape(base, "weight"), parameter_device(base, "weight")
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can approximate this layer's adapter by LoRA: it can for linear weights."""
        return False
