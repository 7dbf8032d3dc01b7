"""The only module that touches PEFT's internals: enum extension, registration and the version guard."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from enum import Enum

import peft
from packaging.version import Version
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .errors import ConfigError

SUPPORTED_PEFT = ("0.21", "0.22")
# Names of the tuner types of this package.
_OURS: set[str] = set()


def check_peft_version(version: str = peft.__version__) -> None:
    """Refuse a PEFT whose internal hooks are not the ones this package was built on.

    Raises:
        ImportError: the version lies outside `SUPPORTED_PEFT` (lower bound included, upper excluded).
    """
    low, high = SUPPORTED_PEFT
    # `release` leaves out ".dev0": a development version of 0.22 has 0.22's internals.
    if not Version(low).release <= Version(version).release < Version(high).release:
        raise ImportError(
            f"peft_sparse supports peft >= {low}, < {high}, found {version}. It builds on hooks of PEFT that change "
            f'between minor versions: pip install "peft>={low},<{high}", or look for a newer peft-sparse.'
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


def add_peft_type(name: str) -> PeftType:
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
    takes = str(inspect.signature(set_one).parameters["adapter_name"].annotation).lower()
    if hasattr(set_one, "__wrapped__") or "list" in takes or "sequence" in takes:
        return

    @functools.wraps(set_one)
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

    @functools.wraps(delete)
    def delete_adapter(self: PeftModel, adapter_name: str) -> None:
        delete(self, adapter_name)
        if self.peft_type in _OURS and self.active_adapter not in self.peft_config and self.active_adapters:
            self.active_adapter = self.active_adapters[-1]

    PeftModel.set_adapter = set_adapter
    PeftModel.delete_adapter = delete_adapter
