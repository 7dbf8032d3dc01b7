"""Calling a base module with other parameters, with its own hooks, and where accelerate offloads its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import named_module_tensors
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...errors import ConfigError

# Where torch keeps the hooks of a module that take the module as their first argument.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def own_forward(module: nn.Module) -> Any:
    """The forward that was set on this module itself, accelerate's aside; None if it computes as its class does."""
    given = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
    is_of_class = isinstance(given, MethodType) and given.__func__ is type(module).forward
    return None if is_of_class else given


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether a function that is no method of the module replaces its forward: it may read the weight itself."""
    given = own_forward(module)
    return given is not None and not (isinstance(given, MethodType) and given.__self__ is module)


def foreign_forward(module: nn.Module, name: str) -> ConfigError:
    """The error for such a module; `name` is its path."""
    return ConfigError(
        f"the forward of {name} ({type(module).__name__}) was replaced on this very module, by a function that reads "
        "its weight itself and would not see the delta. Add the adapter before whatever replaces it, or leave the "
        f"module out with exclude_modules=[{name!r}]."
    )


def seen_through(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """A shallow copy of a module in which parameters of these names are other tensors; the module is left alone.

    It shares buffers and children, has no hooks, and what a method of it writes into its attributes is lost.
    """
    view: nn.Module = object.__new__(type(module))
    # A replica of `nn.DataParallel` has its parameters as attributes, which would hide these.
    left_out = {"forward", "_hf_hook", "_old_forward", *tensors}
    state = {name: value for name, value in vars(module).items() if name not in left_out}
    state["_parameters"] = {**module._parameters, **tensors}
    state.update({hooks: {} for hooks in _HOOKS})
    given = own_forward(module)
    if given is not None:
        state["forward"] = MethodType(given.__func__, view)
    object.__setattr__(view, "__dict__", state)
    return view


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs around a module's forward: hooks of torch's, or accelerate's."""
    own = vars(module)
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "_hf_hook" in own
    )


def output_of(module: nn.Module, x: Tensor) -> Any:
    """`module(x)`; of a plain linear layer without hooks its product, without the time that calling a module takes.

    Text is generated a row at a time: calling a layer of 512 x 512 costs a tenth of its product then.
    """
    own = vars(module)
    if _is_plain_linear(module) and not (has_hooks(module) or _has_any_global_hook()):
        return F.linear(x, own["_parameters"]["weight"], own["_parameters"]["bias"])
    return module(x)


def output_without_hooks(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What a module's forward makes of its inputs, whatever hooks it has."""
    if _is_plain_linear(module):
        return F.linear(x, module._parameters["weight"], module._parameters["bias"])
    return seen_through(module, {}).forward(x, *args, **kwargs)


def _is_plain_linear(module: nn.Module) -> bool:
    own = vars(module)
    if type(module) is not nn.Linear or "forward" in own or own.get("_compiled_call_impl"):
        return False
    return "weight" in own["_parameters"] and "bias" in own["_parameters"]


def called(module: nn.Module, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`compute(*args, **kwargs)` in the place of a module's forward: with the hooks that are on the module, and its
    weights on the device where accelerate computes.
    """
    # `__dict__`: torch 2.8 exports a model strictly where it is read, and refuses `vars`.
    own = module.__dict__
    if any(own[hooks] for hooks in _HOOKS):
        view = seen_through(module, {})
        for hooks in _HOOKS:
            vars(view)[hooks] = {key: partial(_as_if_on, module, hook) for key, hook in own[hooks].items()}
        vars(view)["forward"] = partial(_aligned, module, compute)
        return view(*args, **kwargs)
    return _aligned(module, compute, *args, **kwargs)


def _as_if_on(module: nn.Module, hook: Callable[..., Any], view: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return hook(module, *args, **kwargs)


def _aligned(module: nn.Module, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return compute(*args, **kwargs)
    output = None
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
            output = compute(*args, **kwargs)
    finally:
        output = hook.post_forward(module, output)
    return output


def attribute_of(module: nn.Module, name: str, view: Callable[[], nn.Module]) -> Any:
    """What a base module has under a name, for the layer that took its place in the model.

    Private attributes that the class does not know are left out: libraries mark modules by them.

    Args:
        module: the base module.
        name: the attribute.
        view: gives the module with its adapters in it. Methods and properties are those of that.

    Raises:
        AttributeError: the module has no such attribute.
    """
    kind = type(module)
    is_known = hasattr(kind, name) or any(name in inspect.get_annotations(each) for each in kind.__mro__)
    if is_known or not name.startswith("_"):
        for held in (vars(module), module._buffers, module._modules, module._parameters):
            if name in held and not (isinstance(held[name], MethodType) and held[name].__self__ is module):
                return held[name]
        if name in vars(module) or hasattr(kind, name):
            return getattr(view(), name)
    raise AttributeError(name)


class LikeItsBase(nn.Module):
    """A layer around a base module: an attribute that it lacks is that of the base module."""

    # `peft.helpers.disable_input_dtype_casting` sets it on every tuner layer. Here inputs are cast where the base layer
    # casts them, whatever it says.
    cast_input_dtype_enabled = True

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "base_layer" not in modules:
                raise
            try:
                return self._attribute_of_base(name)
            except AttributeError:
                pass
            # torch's error, which names this layer's class.
            raise

    def _attribute_of_base(self, name: str) -> Any:
        """What the base module has under a name: see `attribute_of`.

        Raises:
            AttributeError: it has nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its base layer is read")


# ---- accelerate's offloading ---------------------------------------------------------------------


def offload_hook(module: nn.Module) -> Any:
    """The hook of accelerate that keeps a module's own parameters elsewhere between its forwards; None without one."""
    hook = vars(module).get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return next((each for each in hooks if getattr(each, "offload", False)), None)


def home_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """The device on which a module computes with one of its parameters."""
    hook = offload_hook(module) if tensor.is_meta else None
    return tensor.device if hook is None else torch.device(hook.execution_device)


@contextmanager
def loaded(module: nn.Module, *, store: bool = False) -> Iterator[None]:
    """Load a module's own parameters for the length of the block, if accelerate offloaded them.

    Args:
        module: which has them.
        store: keep what they are at the end.
    """
    hook = offload_hook(module)
    if hook is None or not any(tensor.is_meta for tensor in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        if store:
            hook.weights_map = {name: tensor.to("cpu") for name, tensor in named_module_tensors(module)}
        hook.post_forward(module, None)


class NeverOffloaded(nn.Module):
    """A module whose parameters stay on the device where accelerate computes, also where it offloads the base model.

    They are few, they are read outside of the module's own forward, and trained ones would lose their gradients.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook" and (hook := offload_hook(self)) is not None:
            hook.pre_forward(self)
            hook.offload = False


class AdapterLinear(NeverOffloaded, nn.Linear):
    """A linear map of an adapter."""
