"""How large an adapter is going to be, known before it takes memory."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import ConfigError, FormatError
from .config import BottleneckConfig
from .invertible import COUPLINGS
from .placement import INVERTIBLE, Site

# An adapter of more parameters than this many times the model's, and so many more, is a mistake, or, where a file says
# so, an attack.
_TIMES_MODEL, _MORE, _MORE_BY_FILE = 16, 2**28, 2**24


def num_parameters(config: BottleneckConfig, sites: Mapping[str, Site]) -> int:
    """How many parameters an adapter has at its sites: 2hm + h + m each; see `bottleneck.invertible` for the others."""
    total = 0
    for site in sites.values():
        width = site.width
        if site.placement != INVERTIBLE:
            size = config.size_for(width)
            total += 2 * width * size + width + size
            continue
        outputs = COUPLINGS[config.invertible].outputs_per_entry
        half = width // 2
        size = max(1, config.share_of(half, config.invertible_reduction_factor))
        total += 2 * size * (half + half * outputs)
    return total


def check_size(config: BottleneckConfig, num_parameters: int, *, model_numel: int, fields: str) -> None:
    """Refuse an adapter that a file cannot hold, or that nobody can mean.

    Args:
        config: its config, which knows how large the file is that it came with.
        num_parameters: how many parameters it is going to have.
        model_numel: how many the base model has.
        fields: the fields that say so, for the error.

    Raises:
        FormatError: the file beside the config is smaller than that.
        ConfigError: there is no such file, and it is out of all proportion to the model.
    """
    if config.file_bytes is not None and num_parameters > config.file_bytes:
        raise FormatError(
            f"adapter_config.json ({fields}) claims {num_parameters:,} parameters, and the file of the weights has "
            f"{config.file_bytes:,} bytes. Nothing was loaded. Download the adapter again, or save it again from the "
            "model that trained it."
        )
    more = _MORE_BY_FILE if config.awaits_file else _MORE
    if num_parameters > _TIMES_MODEL * model_numel + more:
        raise ConfigError(
            f"{fields} ask for an adapter of {num_parameters:,} parameters on a model of {model_numel:,}. Take smaller "
            "ones: 16 to 384 are common."
        )
