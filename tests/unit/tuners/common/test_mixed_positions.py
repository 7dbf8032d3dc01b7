"""Mixed batches through embeddings of positions, which a model looks up once for all examples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from peft_sparse import ConfigError
from tests.support.adapters import adapted
from tests.support.models import bart, bert, gpt2, t5

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["one", "two", "__base__"]


def distilbert() -> nn.Module:
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=24)).eval()


def whisper() -> nn.Module:
    sizes = {"vocab_size": 20, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **tokens)).eval()


def tuned(model: nn.Module, **fields) -> nn.Module:
    return adapted("SPARSE_FT", model, "one", "two", target_modules="all", **fields)


class Counted(nn.Embedding):
    """Positions for all examples alike, [T, H]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[: x.shape[1]]


class Small(nn.Module):
    """A model of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 4), Counted(16, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.positions(input_ids)


def ids(rows: int) -> Tensor:
    return torch.randint(4, 20, (rows, 6), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, name: str | None = None, **more) -> Tensor:
    given = {"input_ids": x}
    if hasattr(model.config, "num_mel_bins"):
        given = {"input_features": x.float().mean(1)[:, None, None].expand(-1, 8, 20), "decoder_input_ids": x}
    if name == "__base__":
        with model.disable_adapter():
            return model(**given, **more).logits
    if name is not None:
        model.set_adapter(name)
    return model(**given, **more).logits


# As many examples as tokens: a dimension of positions is as long as one of examples.
@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("make", [bert, distilbert, gpt2, bart, whisper])
def test_each_example_has_its_own_positions(make: Callable[[], nn.Module], rows: int) -> None:
    model, x, names = tuned(make()), ids(rows), (NAMES * 2)[:rows]
    expected = torch.cat([logits(model, x[i : i + 1], name) for i, name in enumerate(names)])
    torch.testing.assert_close(logits(model, x, adapter_names=names), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected[0], logits(model, x[:1], "__base__")[0])


@pytest.mark.parametrize("rows", [3, 6])
def test_positions_without_examples(rows: int) -> None:
    model = adapted("SPARSE_FT", Small(), "one", "two", target_modules=["positions"])
    names, x = (NAMES * 2)[:rows], ids(rows)
    found = model(input_ids=x, adapter_names=names)
    for i, name in enumerate(["one", "two"]):
        model.set_adapter(name)
        assert torch.equal(found[i], model(input_ids=x)[i])


def test_what_an_embedding_counts_is_told_by_its_own_name() -> None:
    model = adapted("SPARSE_FT", nn.Sequential(OrderedDict(rel_part=Small())), "one", "two", target_modules=["tokens"])
    x = ids(2)
    found = model(x, adapter_names=["one", "two"])
    for i, name in enumerate(["one", "two"]):
        model.set_adapter(name)
        assert torch.equal(found[i], model(x)[i])


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_names_and_examples_are_as_many(names: list[str]) -> None:
    # A position's embedding alone could not tell.
    model = tuned(bert(), exclude_modules=r".*(?<!position_embeddings)")
    with pytest.raises(ValueError, match=r"one adapter per example \(3\)"):
        logits(model, ids(3), adapter_names=names)
    with pytest.raises(ValueError, match=r"one adapter per example \(3\)"):
        model(ids(3), adapter_names=names)


@pytest.mark.parametrize("rows", [2, 6])
def test_distances_between_tokens_have_no_examples(rows: int) -> None:
    model, x = tuned(t5()), ids(rows)
    with pytest.raises(ConfigError, match=r"\['one'\] tune .*relative_attention_bias.* exclude_modules="):
        model(input_ids=x, labels=x, adapter_names=["one", "__base__"] * (rows // 2))


@pytest.mark.parametrize("rows", [2, 6])
def test_the_way_out_for_distances(rows: int) -> None:
    model, x = tuned(t5(), exclude_modules=".*relative_attention_bias"), ids(rows)
    names = ["one", "two"] * (rows // 2)
    with torch.no_grad():
        found = model(input_ids=x, labels=x, adapter_names=names).logits
        for i, name in enumerate(names):
            model.set_adapter(name)
            expected = model(input_ids=x[i : i + 1], labels=x[i : i + 1]).logits
            torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=1e-6)
