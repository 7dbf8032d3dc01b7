"""Where in a transformer a parameter lies, read off its name: embeddings or layer, attention or feed-forward."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

EMBEDDINGS, OTHER = "embeddings", "other"
ATTENTION, FEED_FORWARD, NORM = "attention", "feed-forward", "norm"
# In the order in which tables and plots list them.
PARTS = (EMBEDDINGS, ATTENTION, FEED_FORWARD, NORM, OTHER)

_NORM = re.compile(r"norm|^ln|_ln$|^ln_", re.IGNORECASE)
_EMBEDDINGS = re.compile(r"embed|^wte$|^wpe$|^shared$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|^[qkvo]_proj$", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|^ff$|moe|feed_?forward|dense|^fc\d?$|^c_fc$|intermediate|output|expert|^lin\d$|^w[io](_\d)?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """Where a parameter lies.

    Attributes:
        stack: path of the list of layers that it is in ("encoder.layer", "model.layers"); "" outside of layers.
        layer: its index in that list; None outside of layers.
        part: one of `PARTS`.
    """

    stack: str
    layer: int | None
    part: str

    @property
    def group(self) -> str:
        """What reports call its layer: "embeddings", "encoder.layer.3", or "other"."""
        if self.layer is not None:
            return f"{self.stack}.{self.layer}"
        return EMBEDDINGS if self.part == EMBEDDINGS else OTHER


def place_of(name: str) -> Place:
    """Where the parameter of this name lies.

    The first number in a path counts the layers (later ones are experts, or sub-layers as in T5). Norms are norms
    wherever they lie, but for those of the embeddings, which belong to them.

    Args:
        name: full name of a parameter of the base model, such as "encoder.layer.3.attention.self.query.weight".
    """
    modules = name.split(".")[:-1]
    number = next((n for n, module in enumerate(modules) if module.isdecimal()), None)
    if number is None:
        in_embeddings = any(_EMBEDDINGS.search(module) for module in modules)
        is_norm = bool(modules) and bool(_NORM.search(modules[-1]))
        return Place("", None, EMBEDDINGS if in_embeddings else NORM if is_norm else OTHER)
    # XLM has a list of layers for each part ("attentions.3.q_lin"): there the list's own name says which.
    part = _part_inside(modules[number + 1 :])
    stack = modules[:number]
    return Place(".".join(stack), int(modules[number]), part if part != OTHER else _part_inside(stack[-1:]))


def depths(names: Iterable[str]) -> dict[str, int]:
    """{stack: number of layers} of the stacks that parameters of these names lie in: the highest index, and one."""
    found: dict[str, int] = {}
    for place in map(place_of, names):
        if place.layer is not None:
            found[place.stack] = max(found.get(place.stack, 0), place.layer + 1)
    return found


def by_group(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of parameters by the group that they lie in (`Place.group`), in the order in which a model computes.

    Embeddings, then layers by number, encoders before decoders, then the rest; names keep their order inside a group.
    """
    places = {name: place_of(name) for name in names}
    groups: dict[str, list[str]] = {}
    for name in sorted(places, key=lambda name: _order(places[name])):
        groups.setdefault(places[name].group, []).append(name)
    return groups


def _order(place: Place) -> tuple[int, bool, str, int]:
    if place.layer is not None:
        return 1, "decoder" in place.stack, place.stack, place.layer
    return 0 if place.part == EMBEDDINGS else 2, False, "", 0


def _part_inside(modules: list[str]) -> str:
    if modules and _NORM.search(modules[-1]):
        return NORM
    if any(_ATTENTION.search(module) for module in modules):
        return ATTENTION
    return FEED_FORWARD if any(_FEED_FORWARD.search(module) for module in modules) else OTHER
