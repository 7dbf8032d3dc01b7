"""The methods that `instruction_quality.py` compares, and those that are on trial there.

A method on trial is written here, against the library's public interface, until its figures say that it belongs into
the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_sparse import (
    GivenConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
)
from peft_sparse.selection.criteria import Criterion

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA, LOTTERY, UNTUNED = "lora", "lottery_ticket", "untuned"


@dataclass(frozen=True)
class Run:
    """What a method's config may depend on.

    Attributes:
        count: weights to tune; rank: LoRA's, which trains as many; seed: of supports and initial values.
        model: the base model; energies: {linear layer: [I] mean squared input} where the method
            prepares its model, else empty.
        options: S and gamma of SpIEL, among others.
    """

    count: int
    rank: int
    seed: int
    model: nn.Module
    energies: dict[str, Tensor]
    options: Any


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        learning_rates: where the search begins, best guess first; it goes on by factors of two until the best is
            bracketed.
        config: the adapter's; None trains the model itself.
        trains_base: whether base weights train, and so have to be float32.
        is_ours: whether `SparseTrainer` trains it; PEFT's own methods and the model itself take transformers' trainer.
        prepare: what is done to the tuned model before it trains; may return a callback.
    """

    learning_rates: tuple[float, ...]
    config: Callable[[Run], PeftConfig | None]
    trains_base: bool = False
    is_ours: bool = True
    prepare: Callable[[nn.Module, Run], TrainerCallback | None] | None = None


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output:
            yield name, module


@torch.no_grad()
def input_energies(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """{linear layer: [I] float32, mean over the tokens of its inputs squared}."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0][mask].float().square().sum(0)
            sums[name] = squares if name not in sums else sums[name] + squares

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linear_layers(model)]
    device = next(model.parameters()).device
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        mask = batch["attention_mask"].bool()
        tokens += int(mask.sum())
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


class ScaledSteps(TrainerCallback):
    """Scales each of the optimizer's steps.

    Args:
        scales: gives (parameter, the factor of its steps, a number or one for each entry); called at the first
            step, when the support is chosen.
    """

    def __init__(self, scales: Callable[[], list[tuple[nn.Parameter, Tensor]]]) -> None:
        self._find = scales
        self.scales: list[tuple[nn.Parameter, Tensor]] = []
        self.before: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.scales = self.scales or self._find()
        self.before = [parameter.detach().clone() for parameter, _ in self.scales]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        parameters = [parameter for parameter, _ in self.scales]
        moved = torch._foreach_sub(parameters, self.before)
        torch._foreach_mul_(moved, [scale for _, scale in self.scales])
        torch._foreach_add_(moved, self.before)
        torch._foreach_copy_(parameters, moved)


class LocalWarmUp(TrainerCallback):
    """The first steps of a weight that was grown are a part of what they would be, which grows with its age.

    Args:
        length: the age at which steps are whole.
    """

    def __init__(self, length: int) -> None:
        self.length, self.updates = length, 0
        self.before: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        # Within the step: what reselects hears of it afterwards.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def _before_step(self, optimizer, args, kwargs) -> None:
        self.updates += 1
        self.before = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        for parameter, before in self.before:
            age = optimizer.state[parameter]["age"].to(parameter.device)
            share = torch.where(age < self.updates, (age / self.length).clamp(max=1), 1.0)
            parameter.copy_(before.lerp(parameter, share.to(parameter.dtype)))


def warm_up(model: nn.Module, run: Run) -> LocalWarmUp:
    """Until the next reselection; a grown weight begins with the age that its estimates give it."""
    return LocalWarmUp(run.options.reselection_steps)


def _energy_of_entries(model: nn.Module, run: Run) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
    """(values [k], [k] input energy of each tuned weight's column, mean input energy of its layer)."""
    for name, _, _, delta in iter_deltas(model):
        energy = run.energies[name.removesuffix(".weight")].to(delta.indices.device)
        yield delta.values, energy[delta.indices.long() % delta.shape[1]], energy.mean()


def steps_by_column(model: nn.Module, run: Run) -> ScaledSteps:
    """Each weight steps in inverse proportion to the size of its input, at most ten times the mean, or a tenth."""
    return ScaledSteps(lambda: [(v, (m / e).sqrt().clamp(0.1, 10)) for v, e, m in _energy_of_entries(model, run)])


def steps_by_both(model: nn.Module, run: Run) -> ScaledSteps:
    """By tensor, and half as strongly (by the fourth root) by column."""

    def scale(energy: Tensor, mean: Tensor) -> Tensor:
        return (mean / energy.mean()).sqrt() * (energy.mean() / energy).pow(0.25).clamp(0.2, 5)

    return ScaledSteps(lambda: [(v, scale(e, m)) for v, e, m in _energy_of_entries(model, run)])


class LowRank(nn.Module):
    """x B A for a layer's output, as LoRA with alpha = 2r computes it."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight = layer.get_base_layer().weight
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1], device=weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(nn.functional.linear(x.float(), self.down), self.up).to(x.dtype)


def with_low_rank(model: nn.Module, run: Run) -> None:
    """Beside each sparse delta a low-rank one with as many weights (RoSA's idea)."""
    for layer in dict.fromkeys(layer for _, layer, _, _ in iter_deltas(model)):
        layer.low_rank = LowRank(layer, max(1, run.rank // 2))
        layer.register_forward_hook(lambda module, inputs, output: output + module.low_rank(inputs[0]))


def with_low_rank_at_half_rate(model: nn.Module, run: Run) -> ScaledSteps:
    """`with_low_rank` at the learning rate that LoRA wants, and sparse steps of twice that, as random weights want."""
    with_low_rank(model, run)
    return ScaledSteps(lambda: [(delta.values, torch.full_like(delta.values, 2)) for *_, delta in iter_deltas(model)])


def spiel(kind: type[PeftConfig], **changes):
    def config(run: Run) -> PeftConfig:
        # Which a random support to start from does not look at.
        cycle = {
            "selection_batches": run.options.selection_batches,
            "reselection_steps": run.options.reselection_steps,
            "estimation_steps": run.options.estimation_steps,
        }
        return kind(**{**TARGETS, **cycle, "num_weights": run.count, "seed": run.seed, **changes})

    return config


def spiel_window():
    """SpIEL-AG that nominates over the whole of its estimation window."""
    return lambda run: spiel(SpielAGConfig, nomination_updates=run.options.estimation_steps)(run)


def lora(share: float = 1.0):
    def config(run: Run) -> LoraConfig:
        rank = max(1, int(run.rank * share))
        return LoraConfig(r=rank, lora_alpha=2 * rank, **TARGETS)

    return config


def rand(share: float = 1.0, **changes):
    return lambda run: RandConfig(**{**TARGETS, "num_weights": int(run.count * share), "seed": run.seed, **changes})


def one_shot(criterion, share: float = 1.0, **changes):
    return lambda run: OneShotConfig(
        **{
            **TARGETS,
            "num_weights": int(run.count * share),
            "criterion": criterion,
            "selection_batches": run.options.selection_batches,
            "selection_passes": 1,
            "budget": "uniform",
            **changes,
        }
    )


def half_random(run: Run) -> PeftConfig:
    """Half of the weights drawn at random, half chosen by gradients, which take an eighth of each step."""
    return one_shot("gradient", random_share=0.5, seed=run.seed)(run)


def with_embeddings(run: Run) -> PeftConfig:
    """SpIEL-AG with the same total, which it shares out itself over the linear layers and the embedding."""
    embedding = run.model.get_input_embeddings()
    targets = [name for name, _ in linear_layers(run.model)]
    targets += [name for name, module in run.model.named_modules() if module is embedding]
    names = sorted({name.rsplit(".", 1)[-1] for name in targets})
    return spiel(SpielAGConfig, target_modules=names, budget="global")(run)


def confined(share: float, axis: int):
    """A random support in a random share of the rows (axis 0) or columns (axis 1) of each matrix."""

    def config(run: Run) -> PeftConfig:
        layers = dict(linear_layers(run.model))
        density = run.count / sum(layer.weight.numel() for layer in layers.values())
        generator = torch.Generator().manual_seed(run.seed)
        support = {}
        for name, layer in layers.items():
            shape = layer.weight.shape
            lines = torch.randperm(shape[axis], generator=generator)[: max(1, round(share * shape[axis]))]
            across = torch.arange(shape[1 - axis])
            rows, columns = (lines, across) if axis == 0 else (across, lines)
            inside = (rows[:, None] * shape[1] + columns).flatten()
            k = min(round(density * layer.weight.numel()), inside.numel())
            support[f"{name}.weight"] = inside[torch.randperm(inside.numel(), generator=generator)[:k]]
        return GivenConfig(support=support, task_type="CAUSAL_LM")

    return config


def capped(most: float):
    """|mean gradient|, of each row and each column its `most` * sqrt(density) part at most.

    The budget is uniform, so the cap is in numbers: `most` times what a row or column would hold at random.
    """

    def config(run: Run) -> PeftConfig:
        density = run.count / sum(layer.weight.numel() for _, layer in linear_layers(run.model))

        def score(weight: Tensor, gradients) -> Tensor:
            size = gradients.mean.abs().float()
            for axis in (0, 1):
                cap = max(1, round(most * density * size.shape[axis]))
                rank = size.argsort(axis, descending=True).argsort(axis)
                size = torch.where(rank < cap, size, size * 1e-6)
            return size

        return one_shot(Criterion(score, ("mean",)))(run)

    return config


def fisher_over_energy(weight: Tensor, gradients) -> Tensor:
    """|mean gradient| over the root of its column's mean square: the loss's slope for a step of a given output."""
    mean = gradients.mean.float()
    return mean.abs() / mean.square().mean(0, keepdim=True).sqrt().clamp_min(1e-12)


def lift(rank: int):
    """The largest entries of the weight's best approximation of a low rank (LIFT, arXiv:2506.00772)."""

    def score(weight: Tensor, gradients) -> Tensor:
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        return ((u[:, :rank] * s[:rank]) @ v[:rank]).abs()

    return Criterion(score, ("weight",))


def fitted(config):
    """The same config with a rate that fits its support."""

    def make(run: Run) -> PeftConfig:
        made = config(run)
        made.fitted_rate = True
        return made

    return make


def ours(name: str, rates: tuple[float, ...], config, fitted_rates: tuple[float, ...], **more) -> dict[str, Method]:
    """A method's row, and that of the same with a fitted rate."""
    return {name: Method(rates, config, **more), f"{name}_fitted": Method(fitted_rates, fitted(config), **more)}


# Weights chosen by their gradients change the outputs more than random ones, so they take smaller steps; fitted rates
# are all on the scale of random ones. SpIEL-MA's optimizer, SM3, shrinks its steps, and starts larger.
RANDOM, CHOSEN, ACCUMULATED = (4e-3, 2e-3, 8e-3), (5e-4, 2.5e-4, 1e-3), (8e-3, 4e-3, 1.6e-2)
AS_LORA = (2e-3, 1e-3, 4e-3)
MENDED = {"nomination_updates": 1, "initial_support": "gradient", "selection_passes": 1}
_FAMILIES = [
    ours("rand", RANDOM, rand(), RANDOM),
    ours("one_shot", CHOSEN, one_shot("gradient"), RANDOM),
    ours("spiel_ag", CHOSEN, spiel(SpielAGConfig), RANDOM),
    ours("spiel_ag_mended", CHOSEN, spiel(SpielAGConfig, **MENDED), RANDOM),
    ours("spiel_ma", ACCUMULATED, spiel(SpielMAConfig), ACCUMULATED),
    ours("gallop", (1e-3, 5e-4, 2e-3), one_shot("gradient_on_small_weights"), RANDOM),
    ours("lift", AS_LORA, one_shot(lift(32)), RANDOM),
    ours("capped", (1e-3, 5e-4, 2e-3), capped(4.0), RANDOM),
]
ROWS = {name: method for family in _FAMILIES for name, method in family.items()}
METHODS = {
    LORA: Method(AS_LORA, lora(), is_ours=False),
    **{name: ROWS[name] for name in ("rand", "spiel_ag", "one_shot", "spiel_ma")},
    "full": Method((2e-4, 1e-4, 4e-4), lambda _: None, trains_base=True, is_ours=False),
    "shira": Method(RANDOM, lambda r: ShiraConfig(r=r.rank, random_seed=r.seed, **TARGETS), is_ours=False),
    "super_tuning": Method(
        RANDOM,
        lambda r: SupertuningConfig(
            sparsity=1 - r.count / sum(m.weight.numel() for _, m in linear_layers(r.model)), **TARGETS
        ),
        is_ours=False,
    ),
    LOTTERY: Method(
        (1e-3, 5e-4, 2e-3), lambda r: LotteryTicketConfig(num_weights=r.count, **TARGETS), trains_base=True
    ),
}
EXTRAS = {
    **{name: row for name, row in ROWS.items() if name not in METHODS},
    "half_random": Method(RANDOM, half_random),
    "spiel_ag_whole_update": Method(CHOSEN, spiel(SpielAGConfig, nomination_updates=1)),
    "spiel_ag_window": Method(CHOSEN, spiel_window()),
    "spiel_ag_window_fitted": Method(RANDOM, fitted(spiel_window())),
    "spiel_ag_warm_up": Method(RANDOM, fitted(spiel(SpielAGConfig, **MENDED)), prepare=warm_up),
    "spiel_ag_once": Method(CHOSEN, spiel(SpielAGConfig, **MENDED, reselection_until=0.25)),
    "rand_by_column": Method(RANDOM, rand(), prepare=steps_by_column),
    "one_shot_by_column": Method(RANDOM, one_shot("gradient"), prepare=steps_by_column),
    "one_shot_by_both": Method(AS_LORA, one_shot("gradient"), prepare=steps_by_both),
    "flat_gradient": Method(RANDOM, one_shot(Criterion(fisher_over_energy, ("mean",)))),
    "rand_low_rank": Method(RANDOM, rand(0.5), prepare=with_low_rank),
    "rand_low_rank_at_half_rate": Method(AS_LORA, rand(0.5), prepare=with_low_rank_at_half_rate),
    "lora_of_half_the_rank": Method(AS_LORA, lora(0.5), is_ours=False),
    "one_shot_low_rank": Method(AS_LORA, one_shot("gradient", 0.5), prepare=with_low_rank),
    "rand_all": Method(RANDOM, rand(target_modules="all")),
    "rand_rows": Method(RANDOM, confined(0.1, 0)),
    "rand_columns": Method(RANDOM, confined(0.1, 1)),
    "spiel_ag_global": Method(CHOSEN, spiel(SpielAGConfig, budget="global")),
    "spiel_ma_global": Method(ACCUMULATED, spiel(SpielMAConfig, budget="global")),
    "spiel_ag_embeddings": Method(CHOSEN, with_embeddings),
    "spiel_ag_3_candidates": Method(CHOSEN, spiel(SpielAGConfig, candidates_per_weight=3.0)),
}
