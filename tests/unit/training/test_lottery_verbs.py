from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sparse import ConfigError, LotteryTicketConfig, RandConfig, SelectionError, iter_deltas, resident
from peft_sparse.training.phases.lottery import DensePhase, select, start_dense_phase, start_sparse_phase
from tests.support.models import llama
from tests.support.training import (
    Labelled,
    assert_same_tensors,
    base_weights,
    deltas,
    make_adapted,
    make_bert,
)


def train(model, *, steps=3, lr=1e-2, seed=0, optimizer_class=torch.optim.AdamW, **settings):
    torch.manual_seed(seed)
    data = Labelled(16)
    batch = {key: torch.stack([data[i][key] for i in range(16)]) for key in data[0]}
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_dense_phase_trains_targets_and_heads_and_nothing_else():
    model = make_adapted(target_modules=["query"])
    before = base_weights(model)
    start_dense_phase(model)
    train(model)
    moved = {n for n, p in base_weights(model).items() if not torch.equal(p, before[n])}
    expected = {n for n in before if "query.base_layer.weight" in n or "classifier.modules_to_save.default" in n}
    assert moved == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rewinds_weights_and_heads_bit_for_bit(dtype):
    model = make_adapted(dtype=dtype, target_modules="all")
    before, flags = base_weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with start_dense_phase(model) as phase:
        train(model, optimizer_class=torch.optim.SGD, lr=0.5)
        phase.select()
        assert any(not torch.equal(p, before[n]) for n, p in base_weights(model).items())
    assert_same_tensors(base_weights(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())


def test_buffers_are_rewound():
    model = make_adapted()
    model.base_model.model.register_buffer("running", torch.zeros(3))
    with start_dense_phase(model) as phase:
        train(model)
        model.base_model.model.running.add_(1)
        phase.select()
    assert torch.equal(model.base_model.model.running, torch.zeros(3))


def test_selects_exactly_k_of_the_largest_changes():
    model = make_adapted(num_weights=123, target_modules="all")
    before = base_weights(model)
    phase = start_dense_phase(model)
    train(model)
    after = base_weights(model)
    counts = phase.start_sparse_phase()
    everything, chosen = [], []
    for name, (indices, _) in deltas(model).items():
        module, _, which = f"base_model.model.{name}".rpartition(".")
        key = f"{module}.base_layer.{which}"
        change = (after[key].double() - before[key].double()).abs().flatten()
        everything.append(change)
        chosen.append(change[indices.long()])
        assert counts[name] == indices.numel()
    assert sum(counts.values()) == 123
    assert torch.equal(torch.cat(chosen).sort().values, torch.cat(everything).topk(123).values.sort().values)


def test_ties_go_to_the_lowest_index():
    model = make_adapted(num_weights=10, target_modules=["query"])
    phase = start_dense_phase(model)
    for target in phase.targets:
        phase.originals[target.name].fill_(1.0)
        target.parameter.data.fill_(2.0)
    first, second = select(model).values()
    assert first.tolist() == list(range(10))
    assert second.tolist() == []


def test_uniform_and_grouped_budgets():
    model = make_adapted(num_weights=100, budget="uniform", target_modules=["query", "intermediate.dense"])
    start_dense_phase(model)
    train(model)
    counts = start_sparse_phase(model)
    # 256 and 512 of 1536 weights: 100 * 256 / 1536 = 16.7 and 33.3.
    assert sorted(counts.values()) == [16, 17, 33, 34] or sorted(counts.values()) == [17, 17, 33, 33]
    assert sum(counts.values()) == 100

    shares = {"layer.0": 0.9, "layer.1": 0.1}
    model = make_adapted(num_weights=100, budget=shares, target_modules=["query", "intermediate.dense"])
    start_dense_phase(model)
    train(model)
    counts = start_sparse_phase(model)
    assert sum(n for name, n in counts.items() if "layer.0" in name) == 90
    assert sum(n for name, n in counts.items() if "layer.1" in name) == 10


def test_counts_go_into_the_models_config_and_not_into_the_users():
    config = LotteryTicketConfig(num_weights=50, target_modules=["query"])
    model = get_peft_model(make_bert(), config)
    assert model.peft_config["default"].counts is None
    start_dense_phase(model)
    train(model)
    counts = start_sparse_phase(model)
    assert model.peft_config["default"].counts == counts
    assert config.counts is None


def test_sparse_phase_moves_only_the_support_whatever_the_weight_decay():
    model = make_adapted(dropout=0.0)
    before = base_weights(model)
    start_dense_phase(model)
    train(model)
    start_sparse_phase(model)
    train(model, weight_decay=0.5)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, (indices, values) in deltas(model).items():
        module, _, which = f"base_model.model.{name}".rpartition(".")
        changed = (merged[name] != before[f"{module}.base_layer.{which}"]).flatten().nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(indices.tolist())
        assert (values != 0).all()


def test_too_few_moved_weights_are_an_error_and_the_phase_stays_open():
    model = make_adapted(num_weights=300, target_modules="all")
    phase = start_dense_phase(model)
    with torch.no_grad():
        phase.targets[3].parameter.view(-1)[:7] += 1
    with pytest.raises(SelectionError, match=r"300 weights are asked .* only 7 of \d+ moved\. Train longer"):
        phase.select()
    train(model)
    assert sum(phase.start_sparse_phase().values()) == 300


def test_diverged_training_is_an_error():
    model = make_adapted(target_modules=["query"])
    phase = start_dense_phase(model)
    phase.targets[0].parameter.data[0, 0] = torch.inf
    with pytest.raises(SelectionError, match=r"query\.weight holds an infinite weight. Lower its learning rate"):
        phase.select()
    phase.targets[0].parameter.data[0, 0] = torch.nan
    with pytest.raises(SelectionError, match=r"query\.weight contain NaN"):
        phase.select()


def test_an_exception_takes_everything_back():
    model = make_adapted(target_modules="all")
    before, flags = base_weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), start_dense_phase(model) as phase:  # noqa: PT012
        train(model)
        phase.select()
        raise RuntimeError("stop")
    assert_same_tensors(base_weights(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(values.numel() == 0 for _, values in deltas(model).values())
    assert model.peft_config["default"].counts is None
    # A new phase may begin.
    start_dense_phase(model).abort()


def test_leaving_the_block_without_selecting_takes_everything_back():
    model = make_adapted()
    before = base_weights(model)
    with start_dense_phase(model):
        train(model)
    assert_same_tensors(base_weights(model), before)
    assert model.peft_config["default"].counts is None


def test_starting_inside_resident_mode_sees_pristine_weights():
    model = make_adapted(target_modules=["query"])
    model.add_adapter("language", RandConfig(density=0.5, target_modules=["query"], seed=3, init_weights=False))
    model.base_model.set_adapter(["language", "default"])
    model.set_requires_grad("language", requires_grad=False)
    before = base_weights(model)
    with resident(model):
        train_free_forward(model)
        assert any(not torch.equal(p, before[n]) for n, p in base_weights(model).items())
        phase = start_dense_phase(model)
        for target in phase.targets:
            key = f"base_model.model.{target.name.removesuffix('.weight')}.base_layer.weight"
            assert torch.equal(phase.originals[target.name], before[key])
        phase.abort()
    assert_same_tensors(base_weights(model), before)


def train_free_forward(model):
    with torch.no_grad():
        model(input_ids=Labelled().ids)


def test_language_adapter_stays_applied_and_unchanged():
    """Task LT-SFT on top of a language SFT: the score is the change of the base parameter, under the language delta."""
    model = make_adapted(dropout=0.0, target_modules="all", num_weights=60)
    language = RandConfig(density=0.1, target_modules="all", seed=3, init_weights=False)
    model.add_adapter("language", language)
    language_before = deltas(model, "language")
    # What the paper does: theta + phi_language as the start of an ordinary dense phase.
    merged = make_adapted(dropout=0.0, target_modules="all", num_weights=60)
    with torch.no_grad():
        for (_, layer, which, _), (_, _, _, delta) in zip(
            iter_deltas(merged, "default"), iter_deltas(model, "language"), strict=True
        ):
            getattr(layer.get_base_layer(), which).add_(delta.delta.to_dense())
    model.base_model.set_adapter(["language", "default"])
    model.set_requires_grad("language", requires_grad=False)
    before = base_weights(model)

    start_dense_phase(model)
    start_dense_phase(merged)
    # Not Adam: its first steps turn the rounding noise of a gradient near zero into a whole step.
    sgd = {"optimizer_class": torch.optim.SGD, "lr": 0.1}
    dense, dense_merged = train(model, **sgd), train(merged, **sgd)
    torch.testing.assert_close(dense, dense_merged, rtol=1e-5, atol=1e-6)
    start_sparse_phase(model)
    start_sparse_phase(merged)
    overlap = [
        set(a.tolist()) & set(b.tolist())
        for (a, _), (b, _) in zip(deltas(model).values(), deltas(merged).values(), strict=True)
    ]
    assert sum(map(len, overlap)) >= 58  # two sums in another order may exchange the last ones
    sparse, sparse_merged = train(model, **sgd), train(merged, **sgd)
    torch.testing.assert_close(sparse, sparse_merged, rtol=1e-3, atol=1e-5)
    assert_same_tensors(deltas(model, "language"), language_before)
    assert_same_tensors(
        {n: p for n, p in base_weights(model).items() if "classifier" not in n},
        {n: p for n, p in before.items() if "classifier" not in n},
    )


def make_llama(*, tied, seed=0):
    return llama(seed=seed, vocab_size=30, num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=tied).train()


def test_tied_output_matrix_stays_pristine_and_is_tied_again():
    base = make_llama(tied=True)
    model = get_peft_model(base, LotteryTicketConfig(num_weights=40, target_modules=["embed_tokens", "q_proj"]))
    shared = base.model.embed_tokens.base_layer.weight
    assert base.lm_head.weight is shared
    before = shared.detach().clone()
    phase = start_dense_phase(model)
    assert base.lm_head.weight is not shared
    assert not base.lm_head.weight.requires_grad
    ids = torch.arange(12).view(2, 6)
    # An untied model with the same weights and a frozen output matrix is what LT-SFT's authors train.
    untied = make_llama(tied=False)
    untied.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "sparse_ft" not in k}
    )
    for name, parameter in untied.named_parameters():
        parameter.requires_grad_(name.endswith(("embed_tokens.weight", "q_proj.weight")))
    for network in (model, untied):
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            network(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(base.lm_head.weight, before)
    assert not torch.equal(shared, before)
    assert torch.equal(shared, untied.model.embed_tokens.weight)
    phase.start_sparse_phase()
    assert base.lm_head.weight is shared
    assert torch.equal(shared, before)


def test_tied_output_matrix_alone_may_be_tuned():
    base = make_llama(tied=True)
    model = get_peft_model(base, LotteryTicketConfig(num_weights=5, target_modules=["lm_head"]))
    before = base.model.embed_tokens.weight.detach().clone()
    with start_dense_phase(model) as phase:
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        optimizer.step()
        assert torch.equal(base.model.embed_tokens.weight, before)
        assert not torch.equal(base.lm_head.base_layer.weight, before)
        phase.select()
    assert base.model.embed_tokens.weight is base.lm_head.base_layer.weight
    assert torch.equal(base.lm_head.base_layer.weight, before)


def test_scores_are_float32_changes_of_the_targets():
    model = make_adapted(dtype=torch.bfloat16, target_modules=["query"])
    phase = start_dense_phase(model)
    target = phase.targets[0]
    target.parameter.data[0, 0] = 1.0
    target.parameter.data[0, 0] += 2**-7
    expected = (target.parameter.float() - phase.originals[target.name].float()).abs()
    scores = phase.scores()
    assert scores[target.name].dtype == torch.float32
    assert torch.equal(scores[target.name], expected)
    assert list(scores) == [t.name for t in phase.targets]
    assert len(scores) == 2


def test_low_precision_base_is_warned_of(caplog):
    start_dense_phase(make_adapted(dtype=torch.bfloat16))
    assert "trains base weights in torch.bfloat16" in caplog.text
    assert "Load the base in float32" in caplog.text
    caplog.clear()
    start_dense_phase(make_adapted())
    assert caplog.text == ""


def test_phase_dies_with_its_model():
    model = make_adapted()
    phase = weakref.ref(start_dense_phase(model))
    del model
    gc.collect()
    assert phase() is None


def test_a_copy_of_the_model_has_a_phase_of_its_own():
    model = make_adapted(target_modules=["query"])
    before = base_weights(model)
    start_dense_phase(model)
    twin = copy.deepcopy(model)
    train(twin)
    assert_same_tensors(base_weights(model), before)
    assert sum(start_sparse_phase(twin).values()) == 200
    assert_same_tensors(base_weights(twin), before)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_other_methods_are_refused():
    model = get_peft_model(make_bert(), RandConfig(density=0.1))
    with pytest.raises(ConfigError, match=r"has the method 'rand', whose weights need no dense phase"):
        start_dense_phase(model)
    model = get_peft_model(make_bert(), LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match=r"a sparse adapter, .* has none, got 'default', which has a LoraConfig"):
        start_dense_phase(model)
    with pytest.raises(ConfigError, match=r"model must carry a PEFT adapter, got a BertForSequenceClassification"):
        start_dense_phase(make_bert())
    with pytest.raises(ConfigError, match=r"must be a sparse adapter, one of \['default'\], got 'task'"):
        start_dense_phase(make_adapted(), "task")


def test_selected_adapters_are_refused():
    model = make_adapted(num_weights=11)
    start_dense_phase(model)
    train(model)
    start_sparse_phase(model)
    with pytest.raises(ConfigError, match=r"has its 11 weights already\. Train them, or select anew in a new adapter"):
        start_dense_phase(model)


def test_one_dense_phase_at_a_time():
    model = make_adapted()
    start_dense_phase(model)
    with pytest.raises(ConfigError, match=r"a dense phase of adapter 'default' is open on this model"):
        start_dense_phase(model)


def test_inactive_disabled_and_merged_adapters_are_refused():
    model = make_adapted()
    model.add_adapter("other", LotteryTicketConfig(density=0.1))
    with pytest.raises(ConfigError, match=r"adapter 'other' must be active while .*: model.set_adapter\('other'\)"):
        start_dense_phase(model, "other")
    with model.disable_adapter(), pytest.raises(ConfigError, match="must be active while its weights are selected"):
        start_dense_phase(model)
    model.add_adapter("language", RandConfig(density=0.1, init_weights=False))
    model.merge_adapter(["language"])
    with pytest.raises(
        ConfigError, match=r"adapters \['language'\] are merged into .*: model.unmerge_adapter\(\) first"
    ):
        start_dense_phase(model)


def test_quantised_and_meta_bases_are_refused():
    model = make_adapted(target_modules=["query"])
    layer = next(layer for _, layer, _, _ in iter_deltas(model))
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"query\.weight is quantised, .* SpIEL, or Rand-SFT \(RandConfig\)"):
        start_dense_phase(model)
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(16, 16, device="meta"), requires_grad=False)
    with pytest.raises(ConfigError, match=r"query\.weight is on the meta device"):
        start_dense_phase(model)
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(16, 16), requires_grad=False)
    layer.get_base_layer().weight.ds_id = 3
    with pytest.raises(ConfigError, match=r"query\.weight is sharded by DeepSpeed ZeRO-3: .*DDP"):
        start_dense_phase(model)


def test_real_quantised_base_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    base = make_bert()
    dense = base.bert.encoder.layer[0].attention.self.query
    quantised = bnb.nn.Linear4bit(16, 16, quant_type="nf4")
    quantised.weight = bnb.nn.Params4bit(dense.weight.detach().clone(), requires_grad=False)
    base.bert.encoder.layer[0].attention.self.query = quantised.to("cpu")
    with pytest.raises(ConfigError, match=r"query(\.weight)? is quantised"):
        start_dense_phase(get_peft_model(base, LotteryTicketConfig(density=0.1, target_modules=["query"])))


def test_verbs_out_of_order():
    model = make_adapted()
    with pytest.raises(SelectionError, match=r"adapter 'default' is in no dense phase. Call start_dense_phase"):
        select(model)
    with pytest.raises(SelectionError, match=r"adapter 'default' is in no dense phase"):
        start_sparse_phase(model)
    phase = start_dense_phase(model)
    assert isinstance(phase, DensePhase)
    phase.abort()
    with pytest.raises(SelectionError, match=r"cannot select: the dense phase of adapter 'default' is over"):
        phase.select()
    with pytest.raises(SelectionError, match=r"cannot abort"):
        phase.abort()
