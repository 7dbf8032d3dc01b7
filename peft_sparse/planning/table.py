"""A memory plan as a table, and in words."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from ..tables import FittingTable
from .plan import MemoryPlan


def plan_table(plan: MemoryPlan) -> RenderableType:
    """What takes how much, a column for each phase."""
    workload = plan.workload
    dtype = "4-bit" if workload.load_in_4bit else str(workload.dtype).removeprefix("torch.")
    ways = [f"batch {workload.batch_size} x {workload.sequence_length} tokens", dtype]
    ways += ["gradient checkpointing"] if workload.gradient_checkpointing else []
    ways += ["gradient accumulation"] if workload.gradient_accumulation else []
    rows = [
        (part, *[_shown(phase.parts.get(part, 0)) for phase in plan.phases])
        for part in dict.fromkeys(name for phase in plan.phases for name in phase.parts)
    ]
    total = len(rows)
    rows.append(("in all", *[_shown(phase.total) for phase in plan.phases]))
    for part in dict.fromkeys(name for phase in plan.phases for name in phase.host):
        rows.append((f"{part} (CPU)", *[_shown(phase.host.get(part, 0)) for phase in plan.phases]))
    title = f"{plan.model}, {plan.method}: {plan.num_trained:,} trained weights"
    columns = ("at the peak of", *[phase.name for phase in plan.phases])
    table = FittingTable(title, columns, rows, bold=frozenset({total}), sections=frozenset({total - 1}), is_framed=True)
    return Group(table, Text(", ".join(ways), style="dim"))


def describe_fit(
    plan: MemoryPlan, limit: int, *, best: tuple[float, MemoryPlan] | None, others: Mapping[str, MemoryPlan]
) -> str:
    """Whether a plan fits, up to which density it does, and what fits otherwise.

    Args:
        plan: the plan.
        limit: bytes that there are.
        best: the largest density that fits and the plan for it, if any does.
        others: plans of other methods that fit.
    """
    verdict = "It fits" if plan.fits(limit) else "It does not fit"
    lines = [f"{verdict}: {_shown(plan.peak)} of {_shown(limit)}, without CUDA's own context and fragmentation."]
    if best is not None:
        lines.append(f"The largest density of {plan.method} that fits: {best[0]:g} ({_shown(best[1].peak)}).")
    if not plan.fits(limit):
        shown = ", ".join(f"{name} ({_shown(other.peak)})" for name, other in others.items())
        lines.append(f"Other methods that fit: {shown}." if shown else "None of the other methods fits.")
        ways = [f"--{name.replace('_', '-')}" for name in plan.ways_to_less]
        ways += ["a smaller --batch-size"] if plan.workload.batch_size > 1 else []
        lines += [f"Less memory is needed with {', '.join(ways)}."] if ways else []
    return "\n".join(lines)


def _shown(nbytes: int) -> str:
    """Bytes in the unit that reads best: "1.53 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 1000 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes} B" if nbytes else "-"
