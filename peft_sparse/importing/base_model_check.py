"""Whether an adapter fits the base model that it is said to belong to, by that model's config.json alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints.architecture import Names, class_name_of, listed, read_config, skeleton
from ..checkpoints.tasks import BASE_CLASSES
from ..errors import ConfigError, FormatError

logger = logging.getLogger(__name__)


def config_of_base(base: str, *, revision: str | None, reason: str | None = None) -> PretrainedConfig | None:
    """The configuration of a base model; None, with a warning, for one on the Hub that cannot be had.

    Args:
        base: folder or id on the Hub.
        revision: branch, tag or commit on the Hub.
        reason: why it cannot be done without, if so.

    Raises:
        ConfigError: a folder without such a file, or it cannot be had and there is a reason.
    """
    try:
        return read_config(base, revision=revision)
    except ConfigError as error:
        if reason is not None:
            raise ConfigError(
                f"{reason}, and {error} Give a folder that holds the config.json of the base model: base=... (--base)."
            ) from error
        if Path(base).is_dir():
            raise
        logger.warning("Whether the adapter fits %s was not checked: its config.json cannot be had.", base)
        return None


def parameters_of(
    config: PretrainedConfig, wanted: Iterable[str], *, task_type: str | None, base: str, source: str
) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model of the base's architecture that has the parameters that an adapter changes.

    Args:
        config: of the base model.
        wanted: the parameters, as the adapter calls them.
        task_type: PEFT's, if it is known.
        base, source: what errors call the base and the adapter.

    Returns:
        the model, on the meta device; {name in the adapter: name in the model}.

    Raises:
        FormatError: no class of this architecture has all of them.
    """
    wanted = list(wanted)
    best: tuple[str, list[str]] | None = None
    for class_name in _classes(config, task_type):
        try:
            model = skeleton(config, class_name)
        except ConfigError:
            continue
        names = Names(model)
        found = {name: names.of_adapter(name) for name in wanted}
        missing = [name for name in wanted if found[name] not in names.parameters]
        if not missing:
            return model, found
        if best is None or len(missing) < len(best[1]):
            best = type(model).__name__, missing
    class_name, missing = best or ("it", wanted)
    raise FormatError(
        f"{source} does not belong to {base}: {class_name} lacks {len(missing)} of the {len(wanted)} parameters that "
        f"it changes. Nothing was written. Give the base model that it was trained on: base=... (--base)."
        f"{listed(missing)}"
    )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    config: PretrainedConfig,
    *,
    task_type: str | None,
    base: str,
    source: str,
) -> None:
    """Refuse an adapter whose differences have other names or shapes than the base's parameters.

    Args:
        shapes: of the parameters that the adapter changes, as it calls them.
        config, task_type, base, source: as for `parameters_of`.

    Raises:
        FormatError: they have.
    """
    model, names = parameters_of(config, shapes, task_type=task_type, base=base, source=source)
    own = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    wrong = [
        f"{name}: {list(shape)} in the adapter, {list(own[names[name]])} in the base"
        for name, shape in shapes.items()
        if own[names[name]] != shape
    ]
    if wrong:
        raise FormatError(
            f"{source} does not belong to {base}: {len(wrong)} parameters have other shapes. Nothing was written. Give "
            f"the base model that it was trained on, with the vocabulary that it had then.{listed(wrong)}"
        )


def _classes(config: PretrainedConfig, task_type: str | None) -> list[str]:
    """Classes to try: that of the task, the bare model (with its pooler), the one that the config names."""
    names = [BASE_CLASSES[task_type]] if task_type in BASE_CLASSES else []
    names.append("AutoModel")
    with suppress(ConfigError):
        names.append(class_name_of(config))
    return list(dict.fromkeys(names))
