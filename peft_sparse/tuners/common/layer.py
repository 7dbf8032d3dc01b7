"""Base class of the layers that change weights: they are read like their base layer, and serve mixed batches."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._peft_bridge import BaseTunerLayer
from ...core.on_demand import on_demand
from ...core.ops import is_recorded
from ...core.sharded import is_sharded
from ...errors import ConfigError
from .base_module import (
    LikeItsBase,
    attribute_of,
    called,
    home_of,
    loaded,
    offload_hook,
    output_without_hooks,
    seen_through,
)
from .mixed_batches import NamedRows, check_one_per_example

# The parameters of a base layer that adapters can change.
PARAMETERS = ("weight", "bias")

READ_ALONE = (
    "this is the weight with its adapters in it, made to be read: what is written into it would be lost. The base "
    "layer's own parameter is layer.get_base_layer().weight."
)


class WeightLayer(NamedRows, LikeItsBase, BaseTunerLayer):
    """Base class of tuner layers that change the parameters of the module that they wrap.

    To the model such a layer is its base layer with other weights: `weight` and `bias` are what the active adapters
    make of them, with their gradient, and every other attribute is the base layer's own.
    """

    def requires_grad_(self, requires_grad: bool = True) -> WeightLayer:
        """As any module's; but the base parameters stay frozen where `weight` requires a gradient as it is.

        transformers gives embeddings that it did not resize back the flag that it read off their weight.
        """
        if requires_grad and self.weight.requires_grad:
            return self
        return super().requires_grad_(requires_grad)

    # ---- what the model reads past the forward ---------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with; the base layer's own parameter where no adapter changes it.

        Cost: nothing for its dtype, shape or device. What computes with it forms it, and its gradient, densely.
        """
        return self._read("weight", BaseTunerLayer.weight.fget(self))

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer computes with; the base layer's own parameter where no adapter changes it."""
        return self._read("bias", self.get_base_layer().bias)

    def _read(self, parameter: str, own: Tensor | None) -> Tensor | None:
        if own is None or not own.is_floating_point() or is_sharded(own) or not self.has_own(parameter):
            return own
        # transformers ties parameters that it finds by name: those of the base layer.
        if not torch.compiler.is_compiling() and sys._getframe(2).f_code is nn.Module.get_parameter.__code__:
            return own
        if self.disable_adapters:
            return self.untuned(parameter, [])
        if self.merged:
            return own
        adapters = self.active_adapters
        rows = self.row_names
        if rows is not None:
            adapters = [name for name in dict.fromkeys(rows) if self.acts(name)]
            if adapters and len(set(rows)) > 1:
                return on_demand(own, partial(_refuse_rows, self), (), READ_ALONE)
        leaves = self.leaves(parameter, adapters)
        if not leaves:
            return self.untuned(parameter, adapters)
        base = self.get_base_layer()
        if own.is_meta and offload_hook(base) is not None:
            make = partial(self._read_offloaded, parameter, adapters)
            return on_demand(own, make, leaves, READ_ALONE, device=home_of(base, own))
        make = self.maker(parameter, adapters)
        if own.dim() < 2 or is_recorded():
            return make()
        return on_demand(own, make, [*leaves, own], READ_ALONE)

    def _read_offloaded(self, parameter: str, adapters: Sequence[str]) -> Tensor:
        with loaded(self.get_base_layer()):
            return self.maker(parameter, adapters)()

    def has_own(self, parameter: str) -> bool:
        """Whether the base layer's parameter is itself the tensor that adapters change, and not a packed form of it."""
        return True

    def leaves(self, parameter: str, adapters: Sequence[str]) -> list[Tensor]:
        """The trainable tensors by which `adapters` change a parameter; empty if they do not."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its adapters consist of")

    def maker(self, parameter: str, adapters: Sequence[str]) -> Callable[[], Tensor]:
        """A function that computes a parameter with `adapters` in it, differentiably, from the tensors as they are."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters change a parameter")

    def pristine(self, parameter: str) -> Tensor:
        """The base layer's own parameter without any adapter: itself, or a copy where something is written into it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what is in its base parameters")

    def holds_base(self) -> bool:
        """Whether the base parameters are the base model's, as far as no forward has written into them."""
        return not self.merged

    def untuned(self, parameter: str, adapters: Sequence[str]) -> Tensor:
        """The parameter that a model reads where `adapters`, none of which changes it, act."""
        return self.pristine(parameter)

    def _attribute_of_base(self, name: str) -> Any:
        return attribute_of(self.get_base_layer(), name, self._view)

    def __setattr__(self, name: str, value: Any) -> None:
        # A setting of the base layer, such as the epsilon of a norm, is set where it acts.
        base = self.__dict__.get("_modules", {}).get("base_layer")
        is_ours = name.startswith("_") or name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if base is not None and not is_ours and name != "forward":
            inner = self.get_base_layer()
            if name in vars(inner) or name in inner._modules:
                setattr(inner, name, value)
                return
        super().__setattr__(name, value)

    def _view(self) -> nn.Module:
        """The base layer with its parameters as this layer has them."""
        base = self.get_base_layer()
        return seen_through(base, {p: getattr(self, p) for p in PARAMETERS if hasattr(base, p)})

    def acts(self, adapter_name: str) -> bool:
        """Whether an adapter changes what this layer computes."""
        raise NotImplementedError(f"{type(self).__name__} does not say which adapters act")

    def restore(self) -> None:
        """Take whatever is in the base parameters out of them, bit for bit."""
        raise NotImplementedError(f"{type(self).__name__} does not say what is in its base parameters")

    def refuse_parts(self, adapters: Sequence[str], name: str = "this layer") -> None:
        """Raise a ConfigError if a tensor that `adapters` change is not whole in this process; changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tensors merging would write into")

    def check_finite(self, adapters: Sequence[str]) -> None:
        """Raise a ValueError if merging `adapters` would write a NaN or an infinity; changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not say what merging would write")

    def check_range(self, adapters: Sequence[str]) -> None:
        """Raise a ConfigError if merging finite values would write infinities, as into float16; changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not say what merging would write")

    def keep_entries(self, kept: bool) -> None:
        """Keep what the checks of a merge read, for the merge that follows at once; or give it up."""

    def unmerge(self) -> None:
        """Restore the base parameters bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        with loaded(self.get_base_layer(), store=True):
            self.restore()

    # ---- forward ---------------------------------------------------------------------------------

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the adapters' deltas in it; `args` and `kwargs` are the base layer's own."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it computes with a delta")

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """One adapter per example of the batch; "__base__" stands for none."""
        base = self.get_base_layer()
        if isinstance(base, nn.Embedding):
            x = self._positions_of_each(x, len(adapter_names))
        if any(map(self.acts, adapter_names)):
            check_one_per_example(adapter_names, x)
        if self.merged:
            raise ValueError("adapter_names cannot be given while adapters are merged: call unmerge_adapter() first.")
        if self.disable_adapters:
            raise ValueError(
                "adapter_names cannot be given while adapters are disabled: call enable_adapter_layers() first."
            )
        return called(base, partial(self._mixed_rows, adapter_names), (x, *args), kwargs)

    def _mixed_rows(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self._for_each(x, self._untuned_rows(x, *args, **kwargs))
        if len(result) != len(x):
            raise ValueError(
                f"adapter_names cannot be given: {type(self.get_base_layer()).__name__} mixes the examples."
            )
        least = 2 if isinstance(self.get_base_layer(), nn.Embedding) else 1
        for name in dict.fromkeys(adapter_names):
            if not self.acts(name):
                continue
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)

            def part(value: Any, rows: Tensor = rows) -> Any:
                """What belongs to the rows, of a tensor with one entry per example; anything else as it is."""
                # Beside ids [B, T], one dimension is that of positions [T].
                is_per_example = isinstance(value, Tensor) and value.dim() >= least and len(value) == len(x)
                return value[rows.to(value.device)] if is_per_example else value

            others, named = [part(value) for value in args], {key: part(value) for key, value in kwargs.items()}
            tuned = self._for_each(x[rows], self._tuned_rows(name, result[rows], x[rows], *others, **named))
            result = result.index_copy(0, rows, tuned.to(result.dtype))
        return result

    @staticmethod
    def _positions_of_each(x: Tensor, count: int) -> Tensor:
        """Ids [B, T], also of positions that a model looks up once for all examples, [1, T] or [T]."""
        x = x.unsqueeze(0) if x.dim() == 1 and len(x) != count else x
        return x.expand(count, *x.shape[1:]) if len(x) == 1 else x

    def _for_each(self, x: Tensor, result: Tensor) -> Tensor:
        """What a layer makes of examples x [B, ...], one entry for each: also of embeddings that count positions
        themselves, and give one for all [1, T, H] (BART) or [T, H].
        """
        if not isinstance(self.get_base_layer(), nn.Embedding) or x.dim() < 2:
            return result
        result = result.unsqueeze(0) if result.dim() == 2 else result
        return result.expand(len(x), *result.shape[1:]) if len(result) == 1 else result

    def _untuned_rows(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer alone makes of all examples."""
        self.restore()
        return output_without_hooks(self.get_base_layer(), x, *args, **kwargs)

    def _tuned_rows(self, name: str, base: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What one adapter makes of some examples; `base` is a copy of what the base layer makes of them."""
        del base
        return self._delta_forward([name], x, *args, **kwargs)


def _refuse_rows(layer: WeightLayer) -> Tensor:
    raise ConfigError(
        f"adapter_names cannot name several adapters here: the model reads the weight of a "
        f"{type(layer.get_base_layer()).__name__} itself, once for all examples. Give one adapter per batch, or leave "
        "the module out with exclude_modules."
    )


def not_finite(adapters: Sequence[str], why: str) -> ValueError:
    """The error of `check_finite`."""
    # The first sentences are PEFT's: its tests match them for every tuner.
    return ValueError(
        f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken: {why}. The base "
        "model is unchanged."
    )


def beyond_range(adapters: Sequence[str], parameter: str, dtype: torch.dtype) -> ConfigError:
    """The error of `check_range`."""
    return ConfigError(
        f"merging {', '.join(adapters)} would write infinities: with the adapter in it, a {parameter} leaves the range "
        f"of {dtype} (up to {torch.finfo(dtype).max:.6g}). The base model is unchanged. Load the base in bfloat16 "
        "or float32 and merge there; if training has diverged, go back to an earlier checkpoint."
    )


def not_whole(what: str, how: str | None) -> ConfigError:
    """The error where a process holds only a part of what is to be merged into; `how` is that of `how_sharded`."""
    return ConfigError(
        f"the {what} is {how}, and merging needs all of it. Save the adapter (model.save_pretrained, on every "
        "process), load it onto the base model in a single process, and merge there."
    )
