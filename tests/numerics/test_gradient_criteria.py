"""Criteria of gradients against plain autograd in float64, over every kind of parameter."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse import Criterion, OneShotConfig, iter_deltas, select_by_gradients
from peft_sparse.training.phases import gradient_means

VOCAB = 30
PASSES = 3


@lru_cache
def _original(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":  # linear weights, biases, layer norms, three embeddings
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
        model: nn.Module = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=3, **sizes))
    elif kind == "gpt2":  # Conv1D, and an output matrix tied to the embedding
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    else:  # one embedding for two stacks and the output, norms with a forward of their own
        sizes = {"d_model": 8, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
        tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "tie_word_embeddings": True}
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes, **tokens))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def batches(kind: str, count: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for number in range(count):
        ids = torch.randint(1, VOCAB, (4, 6), generator=torch.Generator().manual_seed(number))
        made.append({"input_ids": ids, "labels": ids[:, 0] % 3 if kind == "bert" else ids})
    return made


def dense_gradients(kind: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model with its output matrix untied, and its gradients for every batch: {parameter: gradient}."""
    model = copy.deepcopy(_original(kind)).requires_grad_(True)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is not None and output.weight is embedding.weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
    found = []
    for batch in batches(kind):
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    return model, found


def oracle(kind: str, criterion: str, names: list[str], k: int) -> dict[str, list[int]]:
    """The k best of all weights by a stable sort, from the formulas alone."""
    model, found = dense_gradients(kind)
    scores = []
    for name in names:
        gradients = torch.stack([one[name] for one in found])
        weight = model.get_parameter(name).detach()
        mean = gradients.mean(0)
        score = {
            "fisher": gradients.square().mean(0),
            "gradient": mean.abs(),
            "weight_times_gradient": (weight * mean).abs(),
            "own": gradients.square().mean(0) - mean.square() + weight,
        }[criterion]
        scores.append(score.flatten().float())
    order = torch.cat(scores).argsort(descending=True, stable=True)[:k]
    ends = torch.tensor([score.numel() for score in scores]).cumsum(0)
    chosen: dict[str, list[int]] = {name: [] for name in names}
    for position in order.tolist():
        which = int(torch.searchsorted(ends, position, right=True))
        chosen[names[which]].append(position - (int(ends[which - 1]) if which else 0))
    return {name: sorted(positions) for name, positions in chosen.items()}


def own(weight, gradients):
    """The variance over batches, plus the weight."""
    return gradients.mean_squared - gradients.mean.square() + weight


def selected(kind: str, criterion: Any, **fields: Any) -> tuple[nn.Module, dict[str, list[int]]]:
    request = {"density": 0.07, "target_modules": "all", "selection_batches": 3, "selection_passes": PASSES, **fields}
    model = get_peft_model(copy.deepcopy(_original(kind)), OneShotConfig(criterion=criterion, **request)).eval()
    chosen = select_by_gradients(model, batches(kind))
    assert {name: delta.indices.tolist() for name, _, _, delta in iter_deltas(model)} == {
        name: indices.tolist() for name, indices in chosen.items()
    }
    return model, {name: indices.tolist() for name, indices in chosen.items()}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("criterion", ["fisher", "gradient", "weight_times_gradient", "own"])
def test_equals_the_dense_computation(kind, criterion):
    _, chosen = selected(kind, own if criterion == "own" else criterion)
    total = sum(map(len, chosen.values()))
    numel = sum(p.numel() for n, p in _original(kind).named_parameters() if n in chosen)
    assert total == round(0.07 * numel)
    assert sum(bool(positions) for positions in chosen.values()) > 3
    assert chosen == oracle(kind, criterion, list(chosen), total)


@pytest.mark.parametrize("passes", [1, 2, 50])
def test_the_number_of_passes_changes_nothing(passes):
    assert selected("gpt2", "fisher", selection_passes=passes)[1] == selected("gpt2", "fisher")[1]


def test_a_weight_of_zero_gradient_is_never_chosen():
    seen = {int(token) for batch in batches("gpt2") for token in batch["input_ids"].flatten()}
    assert len(seen) < VOCAB
    _, chosen = selected("gpt2", "gradient", density=0.5, target_modules=["wte"], budget="uniform")
    assert {position // 8 for position in chosen["transformer.wte.weight"]} <= seen


def _square_each_call(self, gradient, receive=gradient_means.GradientSums.receive):
    receive(self, gradient)
    self.end_batch("a batch")


def _lose_a_batch(self, batch, end_batch=gradient_means.GradientSums.end_batch):
    if not batch.startswith("batch 2"):
        end_batch(self, batch)


# T5 looks up its embedding twice in a batch: squaring each call's gradient by itself loses the cross terms.
@pytest.mark.parametrize(
    ("kind", "criterion", "attribute", "bug"),
    [("t5", "fisher", "receive", _square_each_call), ("bert", "fisher", "end_batch", _lose_a_batch)],
)
def test_the_oracle_notices(kind, criterion, attribute, bug, monkeypatch):
    monkeypatch.setattr(gradient_means.GradientSums, attribute, bug)
    _, chosen = selected(kind, criterion)
    assert chosen != oracle(kind, criterion, list(chosen), sum(map(len, chosen.values())))


def test_a_criterion_that_declares_what_it_uses_gets_just_that():
    given = []

    def score(weight, gradients):
        given.append((weight, gradients.mean, gradients.mean_squared is not None, gradients.batches))
        return gradients.mean_squared

    _, chosen = selected("bert", Criterion(score, uses=("mean_squared",), min_score=0.0))
    assert set(given) == {(None, None, True, 3)}
    assert chosen == selected("bert", "fisher")[1]
