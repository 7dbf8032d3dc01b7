"""LT-SFT end to end against a slow reference written from the paper (Ansell et al. 2022, section 3.1, algorithm 1)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import BertForSequenceClassification

from peft_sparse import LotteryTicketConfig, iter_deltas, resident
from peft_sparse.training.phases.lottery import start_dense_phase
from tests.support.models import bert, llama


def make_bert():
    rates = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return bert(BertForSequenceClassification, vocab_size=30, intermediate_size=32, num_labels=3, **rates).train()


def make_llama():
    sizes = {"vocab_size": 30, "intermediate_size": 32, "num_key_value_heads": 2}
    return llama(tie_word_embeddings=True, **sizes).train()


def bert_batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        ids = torch.randint(0, 30, (4, 6), generator=generator)
        yield {"input_ids": ids, "labels": ids[:, 0] % 3}


def llama_batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        ids = torch.randint(0, 30, (4, 6), generator=generator)
        yield {"input_ids": ids, "labels": ids}


CASES = {
    # Everything but the head, as the paper's task SFTs; the output matrix decoupled and fixed, as its language SFTs.
    "bert": (make_bert, bert_batches, {"target_modules": "all", "modules_to_save": ["classifier"]}),
    "llama": (make_llama, llama_batches, {"target_modules": "all"}),
}
OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr / 10, weight_decay=0.0),
}


def reference(model, names, heads, batches, k, make_optimizer, lr):
    """Algorithm 1 with a mask: full fine-tuning, the K largest changes, rewind, fine-tuning with masked gradients."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names or name in heads}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
    theta_0 = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def fine_tune(masks):
        optimizer = make_optimizer(list(parameters.values()), lr)
        losses = []
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            for name, mask in masks.items():
                parameters[name].grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    dense_losses = fine_tune({})
    change = {name: (parameters[name].detach() - theta_0[name]).abs() for name in names}
    ranked = sorted(
        (
            (-score, rank, i)
            for rank, name in enumerate(names)
            for i, score in enumerate(change[name].flatten().tolist())
        )
    )[:k]
    masks = {name: torch.zeros_like(theta_0[name]) for name in names}
    for _, rank, i in ranked:
        masks[names[rank]].view(-1)[i] = 1
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(theta_0[name])
    sparse_losses = fine_tune(masks)
    phi = {name: parameters[name].detach() - theta_0[name] for name in parameters}
    return masks, phi, dense_losses, sparse_losses


def ours(model, batches, make_optimizer, lr):
    def fine_tune():
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr)
        losses = []
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    with start_dense_phase(model) as phase:
        dense_losses = fine_tune()
        phase.select()
    return dense_losses, fine_tune()


@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_supports_and_values_are_the_papers(case, optimizer, is_resident):
    make, batches, config = CASES[case]
    k = 150
    model = get_peft_model(make(), LotteryTicketConfig(num_weights=k, **config))
    names = [name for name, _, _, _ in iter_deltas(model)]
    plain = make()
    if case == "llama":
        # As section 4.2 has it for language models: the two matrices apart, and the output matrix fixed.
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    heads = {name for name, _ in plain.named_parameters() if case == "bert" and name.startswith("classifier")}
    masks, phi, dense_losses, sparse_losses = reference(plain, names, heads, batches, k, OPTIMIZERS[optimizer], 0.05)
    if is_resident:
        with resident(model):
            found_dense, found_sparse = ours(model, batches, OPTIMIZERS[optimizer], 0.05)
    else:
        found_dense, found_sparse = ours(model, batches, OPTIMIZERS[optimizer], 0.05)

    assert found_dense == dense_losses
    torch.testing.assert_close(found_sparse, sparse_losses, rtol=1e-5, atol=1e-6)
    total = 0
    for name, _, _, delta in iter_deltas(model):
        assert delta.indices.tolist() == masks[name].flatten().nonzero().squeeze(1).tolist(), name
        expected = phi[name].flatten()
        assert not expected[masks[name].flatten() == 0].any()
        # phi is a difference of rounded float32 weights, so it carries their rounding.
        torch.testing.assert_close(delta.values.detach(), expected[delta.indices.long()], rtol=1e-3, atol=2e-6)
        total += delta.count
    assert total == k
    for name in heads:
        head = model.get_parameter(
            f"base_model.model.{name.replace('classifier', 'classifier.modules_to_save.default')}"
        )
        start = make().get_parameter(name)
        torch.testing.assert_close(head.detach() - start, phi[name], rtol=1e-3, atol=2e-6)
