"""What is wrong with a request for targets, said before anything trains: misspelt names, modules that cannot be tuned,
a model that is deeper than the adapter's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..._peft_bridge import BaseTunerLayer, NoMatchingPeftModuleError
from ...checks import nearest
from ...core.names import ends_with, path_of_layer, unwrapped
from ...errors import ConfigError
from ...selection.patterns import fullmatch
from .base_model import modules_around_adapters

logger = logging.getLogger(__name__)

_KEYWORDS = ("all", "all-linear")
_NUMBER = re.compile(r"\.\d+\.")
_LAYER = re.compile(r"(.*?)\.(\d+)\.(.*)")


class NothingTargetedError(ConfigError, NoMatchingPeftModuleError):
    """`target_modules` names nothing in the model: an error of ours, and the one that PEFT has for it."""


class NotInThisStateError(ConfigError):
    """A target cannot be tuned for what was done to the model, such as sharding: leaving it out would be no way out."""


@contextmanager
def warned_once() -> Iterator[None]:
    """Give each warning about targets once in the block, however many models are made in it."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message, known = record.getMessage(), len(seen)
        seen.add(message)
        return len(seen) > known

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def refuse_other_tuners(model: nn.Module, targets: Collection[str], own: type[BaseTunerLayer]) -> None:
    """Refuse to tune what a tuner of another type has a layer around, as transformers' models can hold.

    A layer that changes the base weight would compute past the one in between.

    Args:
        model: the base model.
        targets: paths of the modules that are to be tuned.
        own: class of the tuner's own layers.

    Raises:
        ConfigError: there is such a layer.
    """
    for path, module in modules_around_adapters(model):
        name = unwrapped(path)
        if isinstance(module, BaseTunerLayer) and not isinstance(module, own) and name in targets:
            others = module._all_available_adapter_names()
            raise ConfigError(
                f"{name} carries the adapters {others} of another type already, around which the weight cannot be "
                f"tuned. Load {others} after this one, merge them into the base model first, or leave the module out "
                f"with exclude_modules=[{name!r}]."
            )


def refuse_stacked_types(model: nn.Module, layers: Iterable[BaseTunerLayer]) -> None:
    """Refuse to merge or to take out adapters of a model in which a module has layers of two types, one around the
    other: PEFT puts the module itself in the place of both, and what one restores is not what the other has written.

    Args:
        model: whatever carries the adapters.
        layers: its tuner layers.

    Raises:
        ConfigError: there is such a module; the model is as it was.
    """
    for layer in layers:
        inner = layer._modules.get("base_layer")
        if isinstance(inner, BaseTunerLayer):
            path = next(path for path, module in modules_around_adapters(model) if module is layer)
            names = [one._all_available_adapter_names() for one in (inner, layer)]
            raise ConfigError(
                f"{path_of_layer(path)} carries the adapters {names[0]}, and around them {names[1]} of another type: "
                "one cannot be merged or taken out without the other. Save both, load each into a base model of its "
                "own, and merge them one after the other (peft-sparse merge, then the other type's merge_and_unload)."
            )


def no_linear(model: str) -> NothingTargetedError:
    """The error for "all-linear" on a model without linear layers; `model` is its class."""
    return NothingTargetedError(
        f"target_modules='all-linear' (the default) finds no linear layer in {model}. Sparse fine-tuning tunes "
        "embeddings, norms and convolutions as well (Ada-SFT does not): name them in target_modules, or take all of "
        "them with target_modules='all'."
    )


def check_names(target_modules: Any, modules: Iterable[str], *, is_empty: bool) -> None:
    """Tell of names in `target_modules` that nothing in the model has, with the nearest that there is.

    Args:
        target_modules: as the user wrote it.
        modules: paths of the model's modules.
        is_empty: whether nothing at all is targeted.

    Raises:
        NothingTargetedError: nothing is, and the names are to blame.
    """
    if target_modules is None or target_modules in _KEYWORDS or not target_modules:
        return
    endings = {part for path in modules for part in _endings(path)}
    if isinstance(target_modules, str):
        hints = nearest(target_modules, [*_KEYWORDS, *endings]) if is_empty else ""
        missing: list[str] = [target_modules] if is_empty else []
    else:
        missing = sorted(name for name in target_modules if name not in endings)
        hints = "".join(f" {name!r}:{nearest(name, [*_KEYWORDS, *endings])}" for name in missing)
        hints = hints if "Did you mean" in hints else ""
    if not missing:
        return
    if is_empty:
        keyword = next((keyword for keyword in _KEYWORDS if f"Did you mean {keyword!r}?" in hints), None)
        alone = f" It is written by itself, not in a list: target_modules={keyword!r}." if keyword else ""
        # PEFT's own words first, which others look for.
        raise NothingTargetedError(
            f"Target modules {target_modules} not found in the base model. Please check the target modules and try "
            f"again.{hints}{alone}"
        )
    logger.warning("target_modules: no module of the model is called %s.%s", ", ".join(map(repr, missing)), hints)


def warn_of_exclusions(exclude_modules: Any, modules: Iterable[str]) -> None:
    """Tell of names in `exclude_modules` that nothing in the model has, for what was meant is tuned then.

    Args:
        exclude_modules: as the user wrote it.
        modules: paths of the model's modules.
    """
    modules = list(modules)
    if isinstance(exclude_modules, str):
        missing = [] if any(fullmatch(exclude_modules, path) for path in modules) else [exclude_modules]
    else:
        endings = {part for path in modules for part in _endings(path)} if exclude_modules else set()
        missing = sorted(name for name in exclude_modules or () if name not in endings)
    for name in missing:
        hint = nearest(name, {part for path in modules for part in _endings(path)})
        logger.warning(
            "exclude_modules: no module of the model is called %r, and none is left out for it.%s", name, hint
        )


def warn_of_stacks(target_modules: Any, left_out: Mapping[str, int], *, total: int) -> None:
    """Tell of weights that a request seems to mean and that are in no linear layer: the fused experts of a mixture.

    Args:
        target_modules: as the user wrote it.
        left_out: {parameter: number of its weights}.
        total: number of weights of the model.
    """
    kinds = sorted({_NUMBER.sub(".*.", name) for name in left_out})
    modules = sorted({kind.rpartition(".")[0].rpartition(".")[2] for kind in kinds})
    parameters = sorted({".".join(kind.split(".")[-2:]) for kind in kinds})
    logger.warning(
        "target_modules=%r leaves out %s: matrices stacked in one parameter, as transformers keeps the experts of a "
        "mixture, which are no linear layers. They hold %s of the model's %s weights, and adapters of this library "
        "cannot change them. To train them, take LoRA (LoraConfig(target_parameters=%s)) or train them whole "
        "(modules_to_save=%s); exclude_modules=%s leaves them out without this warning.",
        target_modules or "all-linear",
        ", ".join(kinds),
        f"{sum(left_out.values()):,}",
        f"{total:,}",
        parameters,
        modules,
        modules,
    )


def refuse_norms_by_name(config: Any, modules: Mapping[str, bool]) -> None:
    """Refuse a request that leaves the norms out and names nothing but norms.

    Args:
        config: with target_norms=False.
        modules: {path: whether it is a norm}.

    Raises:
        ConfigError: a name in `target_modules`, or the module of one in `target_parameters`, is that of norms alone.
    """
    listed = [] if isinstance(config.target_modules, str) else list(config.target_modules or ())
    named = {"target_modules": listed, "target_parameters": list(config.target_parameters or ())}
    for field, names in named.items():
        for name in names:
            module = name if field == "target_modules" else name.rpartition(".")[0]
            found = [norm for path, norm in modules.items() if ends_with(path, module)]
            if module and found and all(found):
                raise ConfigError(
                    f"target_norms=False leaves all norms out, and {field} names {name!r}, which are norms: drop one "
                    "of the two. Without target_norms the norms that are named are tuned."
                )


def check_each(paths: Collection[str], check: Callable[[str], object]) -> None:
    """Check every target, and refuse all that cannot be tuned in one error.

    Args:
        paths: of the targets.
        check: raises a ConfigError for one that cannot be tuned.

    Raises:
        ConfigError: see `refuse_unsupported`.
    """
    refused: dict[str, ConfigError] = {}
    for path in paths:
        try:
            check(path)
        except ConfigError as error:
            refused[path] = error
    refuse_unsupported(refused, [path for path in paths if path not in refused])


def refuse_unsupported(refused: Mapping[str, ConfigError], supported: Collection[str]) -> None:
    """Refuse all targets that cannot be tuned at once, with the shortest way to leave them out.

    Args:
        refused: {path: why it cannot be tuned}.
        supported: paths of the other targets.

    Raises:
        ConfigError: there are some. A single one keeps its own error, as does the state that the model is in.
    """
    if not refused:
        return
    found = list(refused.values())
    first = next((error for error in found if isinstance(error, NotInThisStateError)), found[0])
    if len(refused) == 1 or isinstance(first, NotInThisStateError):
        raise first
    names = shortest_exclusion(refused, supported)
    listed = "\n".join(f"  {path}: {str(why).partition('. ')[0]}" for path, why in refused.items())
    raise ConfigError(
        f"{len(refused)} of the targeted modules cannot be tuned. Leave them out with exclude_modules={names}, or "
        f"train them whole with modules_to_save.\n{listed}"
    ) from first


def shortest_exclusion(paths: Iterable[str], kept: Collection[str]) -> list[str]:
    """The shortest endings that name these modules and none of the kept ones; whole paths where there is none.

    Args:
        paths: of the modules to leave out.
        kept: paths of those that must not be left out with them.
    """
    taken = {ending for path in kept for ending in _endings(path)}
    found = [next((ending for ending in _endings(path) if ending not in taken), path) for path in paths]
    return sorted(set(found))


def warn_if_deeper(config: Any, counts: Iterable[str], modules: Iterable[str]) -> None:
    """Say when a loaded adapter tunes the first layers of a model that has more, as one of a smaller model does.

    Args:
        config: the adapter's config; one that names layers means to leave the others out.
        counts: names of the tuned parameters.
        modules: paths of the model's modules.
    """
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets or ())
    if config.layers_to_transform is not None or any(re.search(r"\d", name) for name in names):
        return
    present = _layers_by_list(f"{path}." for path in modules)
    for stack, layers in _layers_by_list(counts).items():
        depth = max(present.get(stack, {0})) + 1
        if layers == set(range(len(layers))) and 1 < len(layers) < depth:
            logger.warning(
                "the adapter tunes the first %d layers of %s, which has %d here. Was it trained on a smaller model? "
                "The layers above keep their pretrained weights.",
                len(layers),
                stack,
                depth,
            )


def _layers_by_list(paths: Iterable[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for path in paths:
        if match := _LAYER.fullmatch(path):
            found.setdefault(match[1], set()).add(int(match[2]))
    return found


def _endings(path: str) -> list[str]:
    """Endings of a path, the shortest first: "c", "b.c", "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
