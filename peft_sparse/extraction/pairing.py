"""Which tensor of the base checkpoint belongs to which of the tuned one, and which tensors are a head of the latter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..errors import FormatError
from .skeleton import Skeleton

# How many mismatches an error lists.
LISTED = 12

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Pairing:
    """Where each parameter of the tuned model is found.

    Attributes:
        base: {parameter: its name in the base}, for what both have.
        tuned: {parameter: its name in the tuned checkpoint}, heads included.
        heads: paths of the modules that are saved whole.
        head_parameters: their parameters, tied ones once.
    """

    base: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    head_parameters: list[str] = field(default_factory=list)


def pair(skeleton: Skeleton, base: Shapes, tuned: Shapes, *, base_source: str, tuned_source: str) -> Pairing:
    """Match two checkpoints, parameter by parameter.

    A parameter may have the base model's prefix in one and not in the other, and a tied one any of its names. What lies
    outside the prefix and differs in shape or is missing in the base is a head, as is a pooler that the base lacks.

    Args:
        skeleton: the tuned model.
        base: {name: shape} of what the base checkpoint holds, as `Skeleton.names_in` names it.
        tuned: the same of the tuned one.
        base_source, tuned_source: what errors call them.

    Raises:
        FormatError: the architectures do not match; all differing tensors are counted, and the first of them listed.
    """
    found, problems, alone = Pairing(), [], list[str]()
    forced = tuple(f"{head}." for head in skeleton.forced_heads())
    for name, shape in skeleton.shapes.items():
        spellings = skeleton.spellings(name)
        there = next((s for s in spellings if s in tuned), None)
        if there is None:
            problems.append(f"{name}: no floating-point tensor in {tuned_source}")
            continue
        if tuned[there] != shape:
            problems.append(f"{name}: {list(shape)} by its own config, {list(tuned[there])} in {tuned_source}")
            continue
        found.tuned[name] = there
        here = next((s for s in spellings if s in base), None)
        is_head = name.startswith(forced) if forced else False
        if not is_head and here is not None and base[here] == shape:
            found.base[name] = here
        elif is_head or _may_be_head(skeleton, name):
            alone.append(name)
        elif here is None:
            problems.append(f"{name}: no floating-point tensor in {base_source}")
        else:
            problems.append(f"{name}: {list(base[here])} in {base_source}, {list(shape)} in {tuned_source}")
    found.heads, homeless = _modules_of(alone, skeleton)
    problems += [f"{name}: only in {tuned_source}, and in no module that could be saved whole" for name in homeless]
    if problems:
        raise FormatError(_mismatch(problems, len(skeleton.shapes), base_source, tuned_source))
    found.head_parameters = [name for name in alone if name in skeleton.aliases[name][:1]]
    return found


def _may_be_head(skeleton: Skeleton, name: str) -> bool:
    return (skeleton.has_head and not name.startswith(skeleton.prefix)) or "pooler" in name.split(".")


def _modules_of(names: Collection[str], skeleton: Skeleton) -> tuple[list[str], list[str]]:
    """The topmost modules that hold nothing but these parameters; and the parameters that no such module holds."""
    alone = set(names)
    heads: dict[str, None] = {}
    homeless = []
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            path = ".".join(parts[:depth])
            if all(other in alone for other in skeleton.shapes if other.startswith(f"{path}.")):
                heads[path] = None
                break
        else:
            homeless.append(name)
    return list(heads), homeless


def _mismatch(problems: list[str], total: int, base_source: str, tuned_source: str) -> str:
    listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
    more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    # A checkpoint that does not fit its own config.
    misfits = any(problem.endswith(f"no floating-point tensor in {tuned_source}") for problem in problems)
    rebuilt = " Models whose tensors transformers rebuilds as it loads them (fused experts) cannot be compared."
    return (
        f"{base_source} and {tuned_source} are not the same architecture: {len(problems)} of {total} parameters do not "
        f"match. Nothing was written. Give the model that was fine-tuned as the base; if its vocabulary was extended, "
        f"resize_token_embeddings and save it first.{rebuilt if misfits else ''}{listed}{more}"
    )
