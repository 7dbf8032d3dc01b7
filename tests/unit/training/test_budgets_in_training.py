"""SC-SFT: shares of the budget hold through training, whatever chooses the weights."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import BertForSequenceClassification

from peft_sparse import (
    DeftXConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    iter_reselectors,
    layer_budget_from,
    select_by_gradients,
    start_dense_phase,
)
from tests.support.models import bert

OFTEN = {"reselection_steps": 2, "estimation_steps": 1, "total_steps": 8}
CONFIGS = {
    "rand": RandConfig,
    "lottery ticket": LotteryTicketConfig,
    "deft_x": DeftXConfig,
    "spiel_ag": lambda **fields: SpielAGConfig(**OFTEN, **fields),
    "spiel_ma": lambda **fields: SpielMAConfig(**OFTEN, **fields),
    "fisher": OneShotConfig,
}
MEASURED = "measured"
# Weights of the embeddings, of layers 0 and 1, of layer 2, and of layer 3 with the pooler.
EXPECTED = {
    "sc_sft_nli": [20, 940, 20, 20],
    "sc_sft_sentiment": [5, 955, 20, 20],
    "sc_sft_mlm": [None, 400, None, None],
    MEASURED: [700, 100, 0, 200],
}


def make_bert():
    sizes = {"vocab_size": 40, "num_hidden_layers": 4, "intermediate_size": 32}
    return bert(BertForSequenceClassification, num_labels=3, **sizes)


def batch(number):
    ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def train(model, updates, after=lambda: None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for number in range(updates):
        model(**batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def by_zone(model):
    zones = [0, 0, 0, 0]
    for name, _, _, delta in iter_deltas(model):
        if name.startswith("bert.embeddings"):
            zones[0] += delta.count
        elif ".layer." in name:
            zones[{"0": 1, "1": 1, "2": 2, "3": 3}[name.split(".")[3]]] += delta.count
        else:
            zones[3] += delta.count
    return zones


def measured():
    shown = {"embeddings": 0.7, r"layer\.[01]\.": 0.1, r"layer\.2\.": 0.0, r"layer\.3\.|pooler": 0.2}
    return layer_budget_from(
        get_peft_model(make_bert(), RandConfig(num_weights=1000, budget=shown, target_modules="all"))
    )


# Every budget once; every way to choose weights with the least even budget, and with one that leaves a zone out.
CASES = [("rand", budget) for budget in EXPECTED]
CASES += [(method, budget) for method in CONFIGS if method != "rand" for budget in ("sc_sft_sentiment", MEASURED)]


@pytest.mark.parametrize(("method", "budget"), CASES)
def test_shares_stay_exactly_at_the_budget(method, budget):
    request = {"num_weights": 1000, "budget": measured() if budget == MEASURED else budget, "target_modules": "all"}
    model = get_peft_model(make_bert(), CONFIGS[method](**request))
    seen = []

    def look():
        zones = by_zone(model)
        assert sum(zones) == 1000
        seen.append([zone for zone, wanted in zip(zones, EXPECTED[budget], strict=True) if wanted is not None])

    if method in ("lottery ticket", "deft_x"):
        with start_dense_phase(model) as phase:
            train(model, 2)
            phase.select()
    if method == "fisher":
        select_by_gradients(model, [batch(number) for number in range(4)])
    before = {name: delta.indices.clone() for name, _, _, delta in iter_deltas(model)}
    look()
    # A support that nothing changes is still the same soon enough.
    train(model, 8 if method.startswith("spiel") else 2, look)
    wanted = [zone for zone in EXPECTED[budget] if zone is not None]
    assert all(zones == wanted for zones in seen)
    if method.startswith("spiel"):
        (reselector,) = iter_reselectors(model)
        assert len(reselector.history) == 4
        assert sum(r.share_replaced for r in reselector.history) > 0.3
        assert any(not torch.equal(before[name], delta.indices) for name, _, _, delta in iter_deltas(model))
