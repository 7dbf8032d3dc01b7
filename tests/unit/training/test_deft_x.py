"""DeFT-X through the two phases: what is denoised, what is chosen, and that all else is LT-SFT."""

from __future__ import annotations

import io
import logging
import re

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

import peft_sparse.training.progress as progress
from peft_sparse import DeftXConfig, SelectionError
from peft_sparse.training.phases.lottery import start_dense_phase
from tests.support.training import assert_same_tensors, base_weights, deltas, make_adapted, make_bert, make_trainer


def make_phase(**config):
    model = make_adapted(method="deft_x", **config)
    return model, start_dense_phase(model)


def move(phase, *, scale=1e-2, seed=3):
    """Move the targets, by a few directions and noise; returns {name: difference} as float32 has it."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    with torch.no_grad():
        for target in phase.targets:
            parameter = target.parameter
            noise = torch.randn(parameter.shape, generator=generator)
            if noise.dim() == 2:
                left, right = (torch.randn(n, 2, generator=generator) for n in noise.shape)
                noise = noise + 2 * left @ right.T
            parameter += scale * noise
            moved[target.name] = parameter - phase.originals[target.name]
    return moved


def by_definition(difference, *, rank, residual_density):
    """|L_r + prune(dW - L_r)| by a full decomposition in float64."""
    u, s, vh = torch.linalg.svd(difference.double(), full_matrices=False)
    r = rank if isinstance(rank, int) else 1 + int(((s**2).cumsum(0) < rank * (s**2).sum()).sum())
    low = (u[:, :r] * s[:r]) @ vh[:r]
    rest = (difference - low).abs()
    kept = rest >= rest.flatten().topk(int(residual_density * rest.numel() + 0.5)).values[-1]
    return torch.where(kept, difference.double(), low).abs()


@pytest.mark.parametrize("rank", [0.9, 1, 3])
def test_the_support_is_the_top_k_of_the_denoised_differences(rank):
    model, phase = make_phase(num_weights=300, target_modules="all", rank=rank, residual_density=0.1)
    expected = {}
    for name, difference in move(phase).items():
        is_embedding = "embeddings" in name
        plain = difference.dim() != 2 or is_embedding
        expected[name] = (
            difference.double().abs() if plain else by_definition(difference, rank=rank, residual_density=0.1)
        )
    scores = phase.scores()
    for name, wanted in expected.items():
        torch.testing.assert_close(scores[name].double(), wanted, rtol=0, atol=1e-8)
    phase.start_sparse_phase()
    threshold = torch.cat([wanted.flatten() for wanted in expected.values()]).topk(300).values.min()
    for name, (indices, _) in deltas(model).items():
        wanted = (expected[name].flatten() >= threshold).nonzero().squeeze(1)
        assert indices.tolist() == wanted.tolist(), name


def test_it_chooses_others_than_lt_sft_and_rewinds_alike():
    supports = []
    for method in ("lottery_ticket", "deft_x"):
        model = make_adapted(method=method, target_modules="all-linear")
        before = base_weights(model)
        with start_dense_phase(model) as phase:
            move(phase)
            phase.select()
        assert_same_tensors(base_weights(model), before)
        supports.append({(name, i) for name, (indices, _) in deltas(model).items() for i in indices.tolist()})
    assert len(supports[0]) == len(supports[1]) == 200
    assert 20 < len(supports[0] & supports[1]) < 190


@pytest.mark.parametrize("nothing_removed", [{"rank": 1.0}, {"rank": 999}, {"residual_density": 1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_removed_is_lt_sft(nothing_removed, dtype):
    found = []
    for method in ({"method": "lottery_ticket"}, {"method": "deft_x", "denoise_embeddings": True, **nothing_removed}):
        model = make_adapted(dtype=dtype, target_modules="all", **method)
        phase = start_dense_phase(model)
        move(phase, scale=0.3)
        phase.start_sparse_phase()
        found.append(deltas(model))
    assert_same_tensors(found[0], found[1])


def test_embeddings_are_denoised_where_that_is_asked():
    config = {"target_modules": "all", "rank": 1, "residual_density": 0.0}
    _, plain = make_phase(**config)
    _, denoised = make_phase(**config, denoise_embeddings=True)
    moved = move(plain)
    move(denoised)
    embeddings = [name for name in moved if "embeddings.weight" in name]
    assert len(embeddings) == 3  # words, positions, types
    for name, difference in moved.items():
        is_plain = difference.dim() != 2 or name in embeddings
        assert torch.equal(plain.scores()[name], difference.abs()) == is_plain, name
        if difference.dim() == 2:
            # The magnitudes of a matrix of rank 1 are one, too.
            assert torch.linalg.matrix_rank(denoised.scores()[name], rtol=1e-5) == 1, name


def test_budgets_per_group_and_uniform():
    targets = ["query", "intermediate.dense"]
    shares = {"layer.0": 0.9, "layer.1": 0.1}
    model, phase = make_phase(num_weights=100, budget=shares, target_modules=targets)
    move(phase)
    counts = phase.start_sparse_phase()
    assert sum(n for name, n in counts.items() if "layer.0" in name) == 90
    assert sum(counts.values()) == 100
    assert {name: indices.numel() for name, (indices, _) in deltas(model).items()} == counts
    _, phase = make_phase(num_weights=96, budget="uniform", target_modules=["query"])
    move(phase)
    assert set(phase.start_sparse_phase().values()) == {48}


def test_low_precision_weights_are_subtracted_in_float32():
    _, phase = make_phase(dtype=torch.bfloat16, target_modules=["query"], rank=1, residual_density=0.0)
    name, target = phase.targets[0].name, phase.targets[0]
    phase.originals[name].fill_(1.0)
    with torch.no_grad():
        # In bfloat16 neither 1.0078125 - 1 nor its sums with others would be told apart from neighbours.
        target.parameter.fill_(1.0078125)
        target.parameter[3] = -1.0078125
    expected = torch.full(target.parameter.shape, 0.0078125)
    expected[3] = 2.0078125
    torch.testing.assert_close(phase.scores()[name], expected, rtol=1e-6, atol=0)


def test_a_weight_counts_by_its_denoised_difference():
    model, phase = make_phase(num_weights=12, target_modules=["query"], rank=1, residual_density=0.0)
    parameter = phase.targets[0].parameter
    with torch.no_grad():
        parameter[[[2], [5], [6], [9]], [1, 4, 8]] += 1.0
        # That one did not move, but all others of its row and column did.
        parameter[5, 4] = phase.originals[phase.targets[0].name][5, 4]
    phase.select()
    phase.start_sparse_phase()
    indices, _ = deltas(model)[phase.targets[0].name]
    assert indices.tolist() == [16 * row + column for row in (2, 5, 6, 9) for column in (1, 4, 8)]


def test_a_difference_of_zero_is_the_usual_error():
    _, phase = make_phase(num_weights=5, target_modules="all-linear")
    with pytest.raises(SelectionError, match=r"5 weights are asked .* only 0 of \d+ moved\. Train longer"):
        phase.select()
    # Rows and columns that did not move offer nothing either.
    with torch.no_grad():
        parameter = phase.targets[0].parameter
        parameter[2, [1, 3]] += 1.0
        parameter[7, 3] += 0.5
    with pytest.raises(SelectionError, match=r"5 weights are asked .* only [34] of \d+ moved\. Train longer"):
        phase.select()
    move(phase)
    assert sum(phase.start_sparse_phase().values()) == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("inf"), r"query\.weight holds an infinite weight\. Lower its learning rate"),
        (float("nan"), r"query\.weight contains NaN or infinity, so it has no singular directions"),
    ],
)
def test_diverged_training_is_an_error(value, message):
    _, phase = make_phase(target_modules=["query"])
    phase.targets[0].parameter.data[0, 0] = value
    with pytest.raises(SelectionError, match=message):
        phase.select()


def test_each_matrix_is_decomposed_once(monkeypatch):
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: calls.append(tuple(gram.shape)) or original(gram))
    _, phase = make_phase(target_modules=["query", "intermediate.dense"], budget="global")
    move(phase)
    phase.select()
    assert calls == [(16, 16)] * 4


def test_the_log_says_what_was_kept(caplog):
    _, phase = make_phase(target_modules="all", rank=2, residual_density=0.0)
    moved = move(phase)
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        phase.select()
    found = re.search(r"denoised (\d+) matrices: ranks 2 to 2, median 2; ([\d.]+)% of their squared", caplog.text)
    matrices = [m.double() for name, m in moved.items() if m.dim() == 2 and "embeddings" not in name]
    kept = sum(float((torch.linalg.svdvals(m)[:2] ** 2).sum()) for m in matrices)
    whole = sum(float(m.square().sum()) for m in matrices)
    assert int(found[1]) == len(matrices)
    assert float(found[2]) == pytest.approx(100 * kept / whole, abs=0.06)


def test_no_matrix_among_the_targets_is_warned_of(caplog):
    _, phase = make_phase(num_weights=20, target_modules=[], target_norms=True)
    move(phase)
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        phase.select()
    assert "found no matrix to denoise among the targets, so it selected as LT-SFT does" in caplog.text


def test_a_progress_bar_on_terminals_alone(monkeypatch, capsys):
    _, phase = make_phase(target_modules=["query"])
    move(phase)
    phase.select()
    assert capsys.readouterr() == ("", "")
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda *, stderr: Console(file=shown, force_terminal=True, width=80))
    phase.select()
    assert "selecting weights" in shown.getvalue()
    assert "2/2" in shown.getvalue()
    # Of several processes the first one shows it.
    shown.truncate(0)
    monkeypatch.setattr(progress, "in_several_processes", lambda: True)
    monkeypatch.setattr(progress.dist, "get_rank", lambda: 1)
    with progress.progress_bar("selecting weights", 2) as advance:
        advance()
    assert "selecting" not in shown.getvalue()


def test_trained_saved_loaded_and_resumed(tmp_path):
    def run(folder, **settings):
        model = make_adapted(method="deft_x", rank=0.8, target_modules="all-linear")
        return make_trainer(folder, model=model, max_steps=4, dense_args={"max_steps": 3}, **settings)

    trainer = run(tmp_path / "whole")
    trainer.train()
    assert trainer.dense_state.global_step == 3
    assert sum(indices.numel() for indices, _ in deltas(trainer.model).values()) == 200
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter")
    config = loaded.peft_config["default"]
    assert (type(config), config.rank, config.residual_density) == (DeftXConfig, 0.8, 0.05)
    assert_same_tensors(deltas(loaded), deltas(trainer.model))
    assert "rank 0.8 (of the squared" in (tmp_path / "adapter" / "README.md").read_text()

    run(tmp_path / "parts", save_strategy="steps", save_steps=2).train()
    for path in (tmp_path / "parts").glob("checkpoint-*"):
        path.rename(tmp_path / path.name)
    # What is left is the selection: the sparse phase runs again from it.
    resumed = run(tmp_path / "parts", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.dense_state is None
    assert_same_tensors(deltas(resumed.model), deltas(trainer.model))


def test_output_matrices_of_gpt2s_kind_are_denoised_like_linear_ones():
    # transformers' Conv1D holds [in, out]: the transpose of a Linear, whose denoised difference is the transpose.
    from peft_sparse.training.phases.denoiser import Denoiser

    denoiser = Denoiser(DeftXConfig(density=0.1, rank=2, residual_density=0.1))
    difference = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    one = denoiser("a", nn.Linear(12, 8), difference)
    other = denoiser("b", nn.Linear(8, 12), difference.T.contiguous())
    torch.testing.assert_close(one, other.T, rtol=0, atol=1e-7)
