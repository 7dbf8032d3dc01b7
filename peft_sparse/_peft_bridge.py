"""The only module that knows PEFT's internals: what we use of them, the enum's extension, registration, the version.

Whether a PEFT will do is asked of what it has, not of its version: a hook that is gone is named by an error at import.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from enum import Enum
from functools import cache, wraps
from importlib import import_module
from typing import Any, NamedTuple

import peft
from packaging.version import Version
from peft import PeftModel
from transformers.integrations import PeftAdapterMixin

from .errors import ConfigError

OLDEST_PEFT = "0.21"
NEWEST_TESTED_PEFT = "0.21"

_TUNERS = "peft.tuners.tuners_utils"
_OTHER = "peft.utils.other"
_QUANTIZATION = "peft.utils.quantization_utils"
# Names of the tuner types of this package.
_OURS: set[str] = set()


class Internal(NamedTuple):
    """A name of PEFT's that is not part of its public interface."""

    module: str
    name: str
    # Attributes that we override or read.
    members: tuple[str, ...]
    # The file of tests that sees it change its meaning; that it is there at all is seen at import.
    test: str


# All of them, in the order in which they are asked for below.
INTERNALS: list[Internal] = []


def find(internal: Internal) -> Any:
    """What PEFT has under a name.

    Raises:
        ImportError: the name or one of its members is gone.
    """
    gone = f"{internal.module}.{internal.name}"
    try:
        found = getattr(import_module(internal.module), internal.name)
        for member in internal.members:
            gone = f"{internal.module}.{internal.name}.{member}"
            getattr(found, member)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"peft_sparse builds on {gone}, which peft {peft.__version__} does not have. Install a version that was "
            f'tested, pip install "peft=={NEWEST_TESTED_PEFT}.*", or look for a newer peft-sparse.'
        ) from error
    return found


def _internal(module: str, name: str, members: tuple[str, ...], test: str) -> Any:
    """What PEFT has under a name, which `INTERNALS` then lists."""
    INTERNALS.append(Internal(module, name, members, test))
    return find(INTERNALS[-1])


BaseTuner = _internal(
    _TUNERS,
    "BaseTuner",
    (
        "_cast_adapter_dtype",
        "_check_merge_allowed",
        "_check_target_module_exists",
        "_check_tied_modules",
        "_create_and_replace",
        "_get_adapter_state_dict",
        "_inject_parameters",
        "_prepare_adapter_config",
        "_remap_adapter_state_dict_for_load",
        "_remove_adapter_name_from_key",
        "_replace_module",
        "_unload_and_optionally_merge",
        "active_adapters",
        "delete_adapter",
        "inject_adapter",
        "merge_adapter",
        "merge_and_unload",
        "set_adapter",
    ),
    "tests/unit/tuners/common/test_verbs.py",
)
BaseTunerLayer = _internal(
    _TUNERS,
    "BaseTunerLayer",
    (
        "_active_adapter",
        "_all_available_adapter_names",
        "_disable_adapters",
        "_get_embed_scale",
        "_move_adapter_to_device_of_base_layer",
        "active_adapters",
        "adapter_layer_names",
        "disable_adapters",
        "get_base_layer",
        "merged",
        "merged_adapters",
        "other_param_names",
        "set_adapter",
        "set_requires_grad",
        "weight",
    ),
    "tests/unit/tuners/common/test_verbs.py",
)
_ExcludedModule = _internal(_TUNERS, "_ExcludedModule", (), "tests/unit/tuners/sparse_ft/test_targets.py")
_get_in_out_features = _internal(_TUNERS, "_get_in_out_features", (), "tests/unit/tuners/bottleneck/test_bottleneck.py")
_maybe_include_all_linear_layers = _internal(
    _TUNERS, "_maybe_include_all_linear_layers", (), "tests/unit/tuners/sparse_ft/test_targets.py"
)
check_adapters_to_merge = _internal(_TUNERS, "check_adapters_to_merge", (), "tests/unit/tuners/common/test_verbs.py")
NoMatchingPeftModuleError = _internal(
    _TUNERS, "NoMatchingPeftModuleError", (), "tests/unit/tuners/common/test_target_checks.py"
)
AuxiliaryTrainingWrapper = _internal(
    _OTHER,
    "AuxiliaryTrainingWrapper",
    ("_get_available_adapters", "adapter_state_dict", "adapter_state_dict_load_map", "check_set_adapter"),
    "tests/unit/tuners/sparse_ft/test_heads.py",
)
ModulesToSaveWrapper = _internal(
    _OTHER, "ModulesToSaveWrapper", ("delete_adapter", "set_adapter"), "tests/unit/tuners/sparse_ft/test_heads.py"
)
TrainableTokensWrapper = _internal(
    _OTHER,
    "TrainableTokensWrapper",
    ("_get_available_adapters", "adapter_state_dict", "adapter_state_dict_load_map"),
    "tests/unit/tuners/common/test_heads_of_several.py",
)
TrainableTokensLayer = _internal(
    "peft.tuners.trainable_tokens.layer",
    "TrainableTokensLayer",
    ("_check_overlapping_tokens", "forward_adapters", "get_merged_weights"),
    "tests/unit/tuners/common/test_heads_of_several.py",
)
QuantizationBackend = _internal(
    _QUANTIZATION,
    "QuantizationBackend",
    ("backend_name", "get_base_weight", "set_base_weight", "supports_merge"),
    "tests/unit/tuners/sparse_ft/test_quantized_backends.py",
)
get_quantization_kwargs = _internal(
    _QUANTIZATION, "get_quantization_kwargs", (), "tests/unit/tuners/sparse_ft/test_quantized_backends.py"
)
quantization_extra_repr = _internal(
    _QUANTIZATION, "quantization_extra_repr", (), "tests/unit/tuners/sparse_ft/test_quantized.py"
)
resolve_quantization_backend = _internal(
    _QUANTIZATION, "resolve_quantization_backend", (), "tests/unit/tuners/sparse_ft/test_quantized_backends.py"
)
# PEFT calls it on any tuner that has it; `BaseTuner` has none.
_internal(
    "peft.peft_model",
    "PeftModel",
    ("_enable_peft_forward_hooks", "delete_adapter", "set_adapter"),
    "tests/unit/tuners/common/test_verbs.py",
)
_internal("peft.config", "PeftConfig", ("_get_peft_type", "_split_kwargs"), "tests/unit/test_push_to_hub.py")
PeftType = _internal("peft.utils.peft_types", "PeftType", (), "tests/unit/test_package.py")
register_peft_method = _internal("peft.utils.peft_types", "register_peft_method", (), "tests/unit/test_package.py")
PEFT_TYPE_TO_TUNER_MAPPING = _internal("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING", (), "tests/unit/test_package.py")


@cache
def check_peft_version(version: str = peft.__version__) -> None:
    """Refuse a PEFT that is too old, and warn once of a minor version that is newer than those tested.

    Raises:
        ImportError: the version is below `OLDEST_PEFT`.
    """
    # `release` leaves out ".dev0": a development version of 0.22 has 0.22's internals.
    minor = Version(version).release[:2]
    if minor < Version(OLDEST_PEFT).release:
        raise ImportError(
            f'peft_sparse supports peft >= {OLDEST_PEFT}, found {version}: pip install "peft>={OLDEST_PEFT}".'
        )
    if minor > Version(NEWEST_TESTED_PEFT).release:
        warnings.warn(
            f"peft {version} is newer than the newest minor version that peft_sparse was tested with, "
            f"{NEWEST_TESTED_PEFT}. All hooks that it needs are there. If something misbehaves, "
            f'pip install "peft=={NEWEST_TESTED_PEFT}.*", or look for a newer peft-sparse.',
            stacklevel=2,
        )


def add_member(enum: type[Enum], name: str) -> Enum:
    """Return the member `name` of a string enum, adding it as a real member if it is not there yet.

    A real member is the only form that all of PEFT and transformers accept: they iterate the enum, take a member's
    `.value` and look members up by value. Python 3.12 dropped `EnumType.__getattr__`, hence the attribute on the class
    itself.
    """
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    return member


def add_peft_type(name: str) -> Enum:
    """PEFT's own type for a tuner of this package, e.g. "SPARSE_FT"; made on the first call."""
    return add_member(PeftType, name)


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner type with PEFT; a second call for the same name changes nothing.

    Args:
        name: the type's name in capitals, e.g. "SPARSE_FT". transformers derives the state-dict prefix from it, so the
            prefix of `model_cls` must be the name in lower case with an underscore.
        config_cls: its configuration class.
        model_cls: its `BaseTuner` subclass.
    """
    check_peft_version()
    _OURS.add(name)
    take_several_adapters()
    let_adapters_lack_token_rows()
    enable_heads_too()
    if add_peft_type(name) in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)


def take_several_adapters() -> None:
    """Let `PeftModel.set_adapter` take a list of adapters where the tuner is one of this package.

    The tuners add several active adapters up, and `set_adapter` of transformers' models and of tuners takes lists.
    PEFT's own method looks the name up in a dictionary first, and its `delete_adapter` forgets that the adapter that it
    calls the active one may go while several others stay active. Nothing changes for a single name, for other tuners,
    or under a PEFT whose method takes lists itself.
    """
    set_one, delete = PeftModel.set_adapter, PeftModel.delete_adapter
    takes = str(inspect.signature(set_one)).lower()
    if hasattr(set_one, "__wrapped__") or "list" in takes or "sequence" in takes:
        return

    @wraps(set_one)
    def set_adapter(self: PeftModel, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, (list, tuple)) or self.peft_type not in _OURS:
            set_one(self, adapter_name, inference_mode)
            return
        names = list(dict.fromkeys(adapter_name))
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ConfigError(f"adapter {unknown[0]!r} is not in the model, which has {list(self.peft_config)}.")
        if not names:
            raise ConfigError("set_adapter got no name. To compute without adapters: with model.disable_adapter().")
        self.base_model.set_adapter(names, inference_mode=inference_mode)
        # PEFT takes the task from the config of a single one: the last, whose head acts.
        self.active_adapter = names[-1]

    @wraps(delete)
    def delete_adapter(self: PeftModel, adapter_name: str) -> None:
        delete(self, adapter_name)
        if self.peft_type in _OURS and self.active_adapter not in self.peft_config and self.active_adapters:
            self.active_adapter = self.active_adapters[-1]

    PeftModel.set_adapter = set_adapter
    PeftModel.delete_adapter = delete_adapter


def let_adapters_lack_token_rows() -> None:
    """Let an adapter without `trainable_token_indices` be saved and loaded beside one that has them.

    PEFT's wrapper looks every adapter's rows up, and so raises a KeyError of its own. Its wrapper of heads asks first.
    """
    kind = TrainableTokensWrapper
    if hasattr(kind.adapter_state_dict, "__wrapped__"):
        return
    state_of, map_of = kind.adapter_state_dict, kind.adapter_state_dict_load_map

    @wraps(state_of)
    def adapter_state_dict(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        has_rows = adapter_name in self._get_available_adapters()
        return state_of(self, adapter_name, *args, **kwargs) if has_rows else {}

    @wraps(map_of)
    def adapter_state_dict_load_map(self: Any, adapter_name: str) -> dict[str, str]:
        return map_of(self, adapter_name) if adapter_name in self._get_available_adapters() else {}

    kind.adapter_state_dict = adapter_state_dict
    kind.adapter_state_dict_load_map = adapter_state_dict_load_map


def enable_heads_too() -> None:
    """Let `enable_adapters` of transformers' models bring heads back, which their `disable_adapters` takes away.

    Nothing changes for models without an adapter of this package.
    """
    enable = PeftAdapterMixin.enable_adapters
    if hasattr(enable, "__wrapped__"):
        return

    @wraps(enable)
    def enable_adapters(self: Any) -> None:
        enable(self)
        if any(config.peft_type in _OURS for config in self.peft_config.values()):
            for module in self.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    module.enable_adapters(enabled=True)

    PeftAdapterMixin.enable_adapters = enable_adapters
