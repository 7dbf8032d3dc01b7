"""Budgets over the depth of a model: the ready-made ones of SC-SFT, and one measured from the counts of an adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..errors import ConfigError
from .anatomy import EMBEDDINGS, Place, depths, place_of

logger = logging.getLogger(__name__)

BELOW, SECOND_TO_LAST, LAST = "the layers below", "second-to-last layer", "last layer"
# The depth that the papers' shares were found at: its last layer stands for the last twelfth of any model.
_DEPTH_OF_SOURCE = 12
_FEWEST_LAYERS = 3


@dataclass(frozen=True)
class Zone:
    """A part of a model's depth, and its share of the total.

    Attributes:
        name: what errors and reports call it.
        share: of the total.
        members: parameter names, in the order of the model.
    """

    name: str
    share: Fraction
    members: tuple[str, ...]


# {name: {zones that are selected jointly: share}}. The sources give the layers of XLM-R base by number.
LAYER_BUDGETS: dict[str, dict[tuple[str, ...], str]] = {
    "sc_sft_nli": {(EMBEDDINGS,): "0.02", (BELOW,): "0.94", (SECOND_TO_LAST,): "0.02", (LAST,): "0.02"},
    "sc_sft_sentiment": {(EMBEDDINGS,): "0.005", (BELOW,): "0.955", (SECOND_TO_LAST,): "0.02", (LAST,): "0.02"},
    "sc_sft_mlm": {(EMBEDDINGS, SECOND_TO_LAST, LAST): "0.6", (BELOW,): "0.4"},
}


def zones_of(budget: str, names: Iterable[str]) -> list[Zone]:
    """The parts of a model that a ready-made budget gives shares to.

    With L layers, the last group and the second-to-last one have max(1, L/12, halves rounded up) layers each: 1 and 1
    of 6 or 12, 2 and 2 of 24. Several stacks (an encoder and a decoder) count each by its own depth and are grouped
    together. Of what lies outside of layers, embeddings are a part of their own, and the rest (a final norm, a pooler)
    goes with the last layers. A part without parameters leaves its share to the others, in proportion.

    Args:
        budget: one of `LAYER_BUDGETS`.
        names: of all targeted parameters, in the order of the model. They alone tell the depth: the highest layer that
            is targeted (`layers_to_transform` included) counts as the last.

    Returns:
        Parts that have parameters; their shares sum to 1.

    Raises:
        ConfigError: a stack of fewer than three layers, or no layer at all.

    Source: Sharma and Chauhan, SC-SFT, sections 4.1.3 (nli) and 4.1.4 (sentiment); mlm as in the configuration that
    the authors' code ships for language adapters (embeddings and the two top layers jointly). Stated for 12 layers
    there, and by regexes that match neither a pooler nor a final norm, which get no weight in the authors' code.
    """
    places = {name: place_of(name) for name in names}
    stacks = depths(places)
    _check_depths(budget, stacks)
    zones = {name: _zone(place, stacks) for name, place in places.items()}
    groups = {group: tuple(name for name, zone in zones.items() if zone in group) for group in LAYER_BUDGETS[budget]}
    shares = {group: Fraction(LAYER_BUDGETS[budget][group]) for group, members in groups.items() if members}
    whole = sum(shares.values(), Fraction(0))
    for group, members in groups.items():
        if not members:
            logger.info(
                "budget %r: no parameter of %s is targeted, so its share of %s goes to the other groups in proportion",
                budget,
                " + ".join(group),
                LAYER_BUDGETS[budget][group],
            )
    return [Zone(" + ".join(group), share / whole, groups[group]) for group, share in shares.items()]


def measured_shares(counts: Mapping[str, int]) -> dict[str, float]:
    """The distribution over layers that an adapter shows, as a budget: the paper's own way to find shapes.

    Args:
        counts: {parameter: number of tuned weights}; parameters with none matter, for they belong to the targets.

    Returns:
        {regex: share of all weights} for the embeddings, each layer and the rest, as far as there are such. Every
        parameter of `counts` matches one of them, and with it the other parameters of its module. A layer without
        weights has the share 0. On the same parameters and with the same total, each group gets the count it had.

    Raises:
        ConfigError: there are no weights to measure.

    Source: Sharma and Chauhan, SC-SFT, section 3.2 and figures 1 and 2.
    """
    total = sum(counts.values())
    if total == 0:
        raise ConfigError(
            "the adapter tunes no weight, so it shows no distribution over layers. Measure one that has been selected"
        )
    groups: dict[str, list[str]] = {}
    # A file sorts its parameters by name: the order here is one of its own, the same for model and file.
    for name in sorted(counts, key=_order):
        groups.setdefault(place_of(name).group, []).append(name)
    return {_pattern(members): sum(counts[name] for name in members) / total for members in groups.values()}


def _zone(place: Place, stacks: Mapping[str, int]) -> str:
    if place.layer is None:
        return EMBEDDINGS if place.part == EMBEDDINGS else LAST
    depth = stacks[place.stack]
    # Halves are rounded up, in integers.
    size = max(1, (2 * depth + _DEPTH_OF_SOURCE) // (2 * _DEPTH_OF_SOURCE))
    if place.layer >= depth - size:
        return LAST
    return SECOND_TO_LAST if place.layer >= depth - 2 * size else BELOW


def _check_depths(budget: str, stacks: Mapping[str, int]) -> None:
    way_out = "Give the shares yourself, budget={regex: share}, or use 'uniform' or 'global'"
    if not stacks:
        raise ConfigError(
            f"budget={budget!r} gives shares to layers, but no targeted parameter has a number in its path. {way_out}"
        )
    for stack, depth in stacks.items():
        if depth < _FEWEST_LAYERS:
            raise ConfigError(
                f"budget={budget!r} needs at least {_FEWEST_LAYERS} layers in every stack, but the targets reach only "
                f"{depth} in {stack or 'the model'!r}. {way_out}, or leave that stack out with exclude_modules"
            )


def _order(name: str) -> tuple[int, str, int, str]:
    """Embeddings first, then layer by layer, then the rest."""
    place = place_of(name)
    if place.layer is not None:
        return 1, place.stack, place.layer, name
    return 0 if place.part == EMBEDDINGS else 2, "", 0, name


def _pattern(members: list[str]) -> str:
    """A regex for all parameters of the layer that these lie in, or of these very modules if it is no layer."""
    place = place_of(members[0])
    if place.layer is not None:
        return f"^{re.escape(f'{place.stack}.{place.layer}.'.lstrip('.'))}"
    modules = dict.fromkeys(name.rpartition(".")[0] for name in members)
    # The last part of a name is the parameter's own: a module inside of this one is not meant.
    paths = "|".join(re.escape(f"{module}.") if module else "" for module in modules)
    return rf"^(?:{paths})[^.]+$"
