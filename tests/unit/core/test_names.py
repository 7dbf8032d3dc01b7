"""Which modules PEFT trains whole: one rule, told by what PEFT does."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_sparse.core.names import is_trained_whole, lies_in_trained_whole


@pytest.mark.parametrize("names", [["classifier"], ["in1"], ["layer.1.ffn"], ["embeddings"], [".classifier"], ["no"]])
def test_peft_and_the_rule_agree(names):
    config = DistilBertConfig(dim=8, hidden_dim=12, n_layers=2, n_heads=2, vocab_size=10, max_position_embeddings=8)
    model = DistilBertForSequenceClassification(config)
    paths = [path for path, _ in model.named_modules()]
    tuned = get_peft_model(model, LoraConfig(target_modules=["k_lin"], modules_to_save=names)).base_model.model
    found = {path for path, module in tuned.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert {path for path in paths if is_trained_whole(path, names)} == found
    inside = {path for path in paths if any(path == one or path.startswith(f"{one}.") for one in found)}
    assert {path for path in paths if lies_in_trained_whole(path, names)} == inside
