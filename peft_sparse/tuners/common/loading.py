"""An adapter that is loaded is there as a whole, or the model is as it was: whatever fails, and whoever loads it.

PEFT and transformers add an adapter to the model before they open its weights. What a tuner is told of the file, it
checks (`made_for_file`); weights that are not there, pickled ones that are damaged, or an interrupted download it is
not told of, and transformers compares nothing with the config and reports what is missing in a log alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel
from torch import nn
from transformers.integrations import PeftAdapterMixin

from ..._peft_bridge import BaseTunerLayer
from ...checkpoints.adapter_files import CONFIG_FILE, PICKLED
from ...checkpoints.native import SOURCE, canonical_name
from ...errors import ConfigError, FormatError
from .base_model import tensors_of_adapter
from .config import WeightConfig
from .made_for_file import is_made_for_file
from .removal import discard

_MARK = "_peft_sparse_guarded"


def guard_loading() -> None:
    """Let `load_adapter` of PEFT's and of transformers' models take out an adapter of ours that it could not fill.

    Nothing changes for adapters of other types, but that an error leaves what trains as it was.
    """
    for kind, guarded in ((PeftModel, _guarded), (PeftAdapterMixin, _guarded_natively)):
        if not hasattr(kind.load_adapter, _MARK):
            load = guarded(kind.load_adapter)
            setattr(load, _MARK, True)
            kind.load_adapter = load


def _guarded(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    @wraps(load)
    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        folder = _folder(given["model_id"], given.get("kwargs", {}).get("subfolder"))
        with _whole_or_not(self, given["adapter_name"], folder):
            result = load(self, *args, **kwargs)
        if given.get("low_cpu_mem_usage") and isinstance(self.peft_config[given["adapter_name"]], WeightConfig):
            _own_memory(self, given["adapter_name"])
        return result

    return load_adapter


def _guarded_natively(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    @wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        name = given.get("adapter_name") or "default"
        where, download = _place(given)
        with _whole_or_not(self, name, _folder(where, download.get("subfolder"))):
            reads = where is not None and not any(given.get(n) for n in ("peft_config", "adapter_state_dict"))
            if reads and (own := _own_config(where, download)) is not None:
                given["peft_config"] = own
                # transformers takes `adapter_kwargs` for the weights only where it reads the config itself.
                given["kwargs"] = {**given.get("kwargs", {}), "download_kwargs": _download_kwargs(given)}
            result = load(*bound.args, **bound.kwargs)
            config = _configs(self).get(name)
            if isinstance(config, WeightConfig):
                _check_taken(self, config, name, result)
                _own_memory(self, name)
                config.verified = None  # checked, and loaded by now
            return result

    return load_adapter


@contextmanager
def _whole_or_not(model: nn.Module, adapter_name: str, folder: Path | None) -> Iterator[None]:
    """Around the loading of an adapter: what fails takes it out again, if it was made for its file.

    Raises:
        ConfigError: the folder holds no weights.
    """
    names = set(_configs(model))
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    merged = _merged(model)
    try:
        yield
    except BaseException as error:
        is_new = adapter_name not in names
        if is_new:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            for module, mode in training:
                module.training = mode
        config = _configs(model).get(adapter_name)
        is_ours = isinstance(config, WeightConfig)
        if is_ours and (is_new or is_made_for_file(model, config, adapter_name)):
            discard(model, adapter_name)
        if merged and not _merged(model) and isinstance(_configs(model)[merged[0]], WeightConfig):
            model.merge_adapter(merged)  # PEFT unmerges where an adapter is added
        if is_ours and isinstance(error, Exception) and _lacks_weights(folder):
            raise ConfigError(
                f"'{folder}' has no {SOURCE}, the weights of the adapter that its {CONFIG_FILE} describes. Nothing was "
                "loaded. Download the adapter again, or save it again from the model that trained it."
            ) from error
        raise


def _configs(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, dict) else {}


def _merged(model: nn.Module) -> list[str]:
    """The adapters that are merged into a model."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return next((list(layer.merged_adapters) for layer in layers if layer.merged), [])


def _folder(where: Any, subfolder: str | None) -> Path | None:
    return None if where is None else Path(where, subfolder or "")


def _lacks_weights(folder: Path | None) -> bool:
    """Whether a folder of this machine holds the config of an adapter alone."""
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return False
    return not any((folder / name).is_file() for name in (SOURCE, PICKLED))


# ---- transformers --------------------------------------------------------------------------------


def _place(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(folder or id, arguments for the Hub) that transformers' `load_adapter` was given."""
    others = given.get("kwargs", {})
    asked = {**_download_kwargs(given), **({"local_files_only": True} if given.get("local_files_only") else {})}
    download, _, _ = PeftConfig._split_kwargs({**others, **asked})
    return given.get("peft_model_id") or others.get("pretrained_model_name_or_path"), download


def _download_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    """What transformers hands to the Hub where it reads the config of an adapter itself."""
    own = getattr(given.get("load_config"), "download_kwargs", None)
    return {
        **(own or {}),
        **(given.get("kwargs", {}).get("download_kwargs") or {}),
        **(given.get("adapter_kwargs") or {}),
    }


def _own_config(where: Any, download: dict[str, Any]) -> WeightConfig | None:
    """The config of an adapter of ours with what our class finds in its weights; None for any other, or if none is
    there: transformers says what is wrong then.

    Raises:
        ConfigError, FormatError: config or weights are damaged.
    """
    kind = None
    with suppress(ValueError, LookupError, TypeError, OSError):
        kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftConfig._get_peft_type(where, **download))
    if kind is None or not issubclass(kind, WeightConfig):
        return None
    return kind.from_pretrained(where, **download)


def _check_taken(model: nn.Module, config: WeightConfig, adapter_name: str, result: Any) -> None:
    """Compare what transformers has loaded with the adapter, as PEFT's hooks do before they load.

    Raises:
        FormatError: tensors are missing or left over, or hold numbers that are not finite.
    """
    prefix = f".{config.peft_type.value.lower()}_"
    lacking, unknown, broken = (
        sorted(map(str, getattr(result, f"{what}_keys", None) or ()))
        for what in ("missing", "unexpected", "mismatched")
    )
    missing = [key for key in lacking if prefix in key and f".{adapter_name}." in key]
    left = [key for key in unknown if prefix in key and not _is_left_out(config, key)]
    problem = ""
    if missing:
        problem = f"it lacks {len(missing)} tensors, {missing[0]} for one"
    elif left:
        problem = f"it has {len(left)} tensors too many, {left[0]} for one"
    elif broken:
        problem = f"{len(broken)} of its tensors have other shapes here, {broken[0]} for one"
    elif not all(
        bool(torch.isfinite(tensor).all())
        for tensor in tensors_of_adapter(model, adapter_name)
        if tensor.is_floating_point() and not tensor.is_meta
    ):
        problem = "it holds values that are NaN or infinite, so the run that saved it had diverged"
    if problem:
        raise FormatError(
            f"the adapter file does not fit this model and config: {problem}. Nothing was loaded. Load it into the "
            f"architecture it was trained on ({CONFIG_FILE} names it in base_model_name_or_path)."
        )


def _own_memory(model: nn.Module, adapter_name: str) -> None:
    """Copy an adapter's tensors, which PEFT (to save memory) and transformers map out of its file: whoever writes into
    that file would change them.
    """
    for tensor in tensors_of_adapter(model, adapter_name):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _is_left_out(config: WeightConfig, key: str) -> bool:
    """Whether a tensor belongs to a head that the model does not have."""
    module = canonical_name(key).partition(f".{config.peft_type.value.lower()}_")[0]
    return any(module in (part, part.rpartition(".")[0]) for part in config.left_out)
