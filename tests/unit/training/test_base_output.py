"""What the model is without its adapter while a first phase, a selection or a window is under way: the base model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    DeftXConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SpielAGConfig,
    resident,
    select_by_gradients,
    sparse_trainer,
    start_dense_phase,
    start_sparse_phase,
)
from tests.support import merging
from tests.support.models import IDS, bart, bert, llama, logits, picture
from tests.support.tokenizers import of_words
from tests.support.training import assert_same_tensors, base_weights, deltas, make_args

TICKET = {"num_weights": 40, "target_modules": "all", "target_biases": True}


def inputs(model):
    ids = {"input_ids": IDS, "labels": IDS}
    return {**ids, "decoder_input_ids": IDS} if model.config.is_encoder_decoder else ids


def output(model):
    with torch.no_grad():
        return model(**inputs(model)).logits.clone()


def train(model, *, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and p.numel()], lr=1.0)
    for _ in range(steps):
        model(**inputs(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


MODELS = merging.MODELS | {"bart": bart}


@pytest.mark.parametrize("make_config", [LotteryTicketConfig, DeftXConfig], ids=["LT-SFT", "DeFT-X"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_its_dense_phase_is_the_base_model_where_the_adapter_is_disabled(name, make_config):
    base = MODELS[name]()
    before = output(base)
    model = get_peft_model(base, make_config(**TICKET))
    phase = start_dense_phase(model)
    train(model)
    moved = output(model)
    assert (moved - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(output(model), before)
        with torch.enable_grad():
            recorded = model(**inputs(model)).logits
        assert torch.equal(recorded, before)
        assert not recorded.requires_grad
        for target in phase.targets:
            shown = getattr(target.layer, target.which)
            assert torch.equal(shown, phase.originals[target.name]), target.name
    assert torch.equal(output(model), moved)
    phase.start_sparse_phase()
    assert torch.equal(output(model), before)


def test_text_is_generated_by_the_base_model():
    base = llama()
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = base.generate(IDS, **settings)
    model = get_peft_model(base, LotteryTicketConfig(**TICKET))
    with start_dense_phase(model):
        train(model, steps=4)
        tuned = model.generate(input_ids=IDS, **settings)
        with model.disable_adapter():
            assert torch.equal(model.generate(input_ids=IDS, **settings), expected)
    assert not torch.equal(tuned, expected)


def test_a_reference_within_a_step_changes_neither_loss_nor_gradient():
    """What DPO does: the policy's forward, the reference's, and then the backward of the policy."""
    gradients = []
    for takes_reference in (False, True):
        model = get_peft_model(llama(), LotteryTicketConfig(**TICKET))
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        phase = start_dense_phase(model.train())
        train(model)
        loss = model(**inputs(model)).loss
        if takes_reference:
            with torch.no_grad(), model.disable_adapter():
                model(**inputs(model))
        loss.backward()
        gradients.append({t.name: t.parameter.grad for t in phase.targets})
    assert_same_tensors(gradients[1], gradients[0])


def test_another_adapter_alone_acts_on_the_base_weights():
    model = get_peft_model(llama(), LotteryTicketConfig(**TICKET))
    other = RandConfig(density=0.2, target_modules="all", init_weights=False, seed=3)
    model.add_adapter("other", other)
    model.set_adapter("other")
    before = output(model)
    model.set_adapter("default")
    with start_dense_phase(model) as phase:
        train(model)
        moved = output(model)
        model.set_adapter("other")
        for mode in (True, False):
            model.train(mode)
            with torch.enable_grad():
                torch.testing.assert_close(model(**inputs(model)).logits, before, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)
        with resident(model):
            torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-6)
        shown = {t.name: getattr(t.layer, t.which).detach().clone() for t in phase.targets}
        model.set_adapter("default")
        assert torch.equal(output(model), moved)
        phase.select()
    model.set_adapter("other")
    for target in phase.targets:
        assert torch.equal(shown[target.name], getattr(target.layer, target.which)), target.name
    assert torch.equal(output(model), before)


def test_both_at_once_train_the_base_weights_under_the_other_adapter_and_are_disabled_together():
    model = get_peft_model(llama(), LotteryTicketConfig(num_weights=40, target_modules=["q_proj", "norm"]))
    model.add_adapter("other", RandConfig(density=0.2, target_modules=["q_proj"], init_weights=False))
    before = output(model)
    model.base_model.set_adapter(["other", "default"])
    model.set_requires_grad("other", requires_grad=False)
    with start_dense_phase(model), resident(model):
        train(model)
        output(model)
        with model.disable_adapter():
            assert torch.equal(output(model), before)


def test_embeddings_that_peft_saves_beside_the_adapter_are_the_base_models(tmp_path):
    model = get_peft_model(llama(), LotteryTicketConfig(num_weights=40, target_modules=["embed_tokens", "q_proj"]))
    before = model.get_input_embeddings().get_base_layer().weight.detach().clone()
    with start_dense_phase(model):
        train(model)
        assert not torch.equal(model.get_input_embeddings().weight, before)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.model.embed_tokens.base_layer.weight"], before)


def test_a_copy_has_an_output_of_its_own():
    model = get_peft_model(llama(), LotteryTicketConfig(**TICKET))
    before = output(model)
    start_dense_phase(model)
    train(model)
    twin = copy.deepcopy(model)
    moved = output(model)
    start_sparse_phase(model)
    assert torch.equal(output(twin), moved)
    with twin.disable_adapter():
        assert torch.equal(output(twin), before)
    assert torch.equal(output(model), before)


def test_biases_of_a_quantised_layer_start_from_where_they_were():
    bnb = pytest.importorskip("bitsandbytes")
    base = bert().float()
    dense = base.bert.encoder.layer[0].attention.self.value
    quantised = bnb.nn.Linear4bit(16, 16, quant_type="nf4", compute_dtype=torch.float32)
    quantised.weight = bnb.nn.Params4bit(dense.weight.detach().clone(), requires_grad=False)
    quantised.bias = nn.Parameter(dense.bias.detach().clone())
    base.bert.encoder.layer[0].attention.self.value = quantised.to("cpu")
    config = LotteryTicketConfig(num_weights=3, target_modules=[], target_parameters=["value.bias"])
    model = get_peft_model(base, config)
    before = output(model)
    with start_dense_phase(model):
        train(model)
        assert not torch.equal(output(model), before)
        with model.disable_adapter():
            assert torch.equal(output(model), before)


# ---- refused, for the base weights are not what they would be taken for ----------------------------------------------


def test_what_would_take_moved_weights_for_the_base_model_is_refused():
    model = get_peft_model(llama(), LotteryTicketConfig(**TICKET))
    model.add_adapter("other", RandConfig(density=0.2, target_modules="all", init_weights=False))
    untouched = picture(model)
    phase = start_dense_phase(model)
    train(model)
    moved = picture(model)
    for verb in (
        model.merge_adapter,
        lambda: model.merge_adapter(["other"]),
        model.merge_and_unload,
        model.unload,
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(
            ConfigError, match=r"a dense phase of adapter 'default' is open.*start_sparse_phase\(model\)"
        ):
            verb()
        assert picture(model) == moved
    with pytest.raises(ConfigError, match=r"adapter_names cannot be given while a dense phase of adapter 'default'"):
        model.eval()(input_ids=IDS, adapter_names=["__base__", "other"])
    model.delete_adapter("other")
    phase.abort()
    model.add_adapter("other", RandConfig(density=0.2, target_modules="all", init_weights=False))
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert picture(model)["tensors"].keys() == untouched["tensors"].keys()


# ---- other phases ----------------------------------------------------------------------------------------------------


def test_masks_a_selection_and_a_window_leave_the_base_model_as_it_is():
    seen = []
    base = llama()
    before = output(base)

    def loss(model, batch):
        with torch.no_grad(), model.disable_adapter():
            seen.append(torch.equal(output(model), before))
        return model(**batch).loss

    model = get_peft_model(base, OneShotConfig(num_weights=40, criterion="fisher", target_modules="all"))
    alone = get_peft_model(llama(), OneShotConfig(num_weights=40, criterion="fisher", target_modules="all"))
    chosen = select_by_gradients(model, [inputs(model)], loss_fn=loss)
    assert_same_tensors(chosen, select_by_gradients(alone, [inputs(alone)]))

    masks = get_peft_model(llama(), AdaSftConfig(target_modules=["q_proj", "down_proj"]))
    window = get_peft_model(llama(), SpielAGConfig(density=0.1, reselection_steps=2, estimation_steps=2))
    for tuned, lr in ((masks, 10.0), (window, 1.0)):
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=lr)
        for _ in range(5):
            with resident(tuned):
                loss(tuned, inputs(tuned)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert not torch.equal(output(tuned), before)
    assert all(seen)
    assert len(seen) == 4 + 10
    assert torch.equal(logits(llama()), before)
    assert base_weights(window).keys()


def test_dpo_compares_with_the_base_model_in_both_phases(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"]
    base = llama(pad_token_id=0, eos_token_id=2, bos_token_id=1)
    before = output(base)

    class Spy(sparse_trainer(trl.DPOTrainer)):
        def _compute_loss(self, *args, **kwargs):
            with self.model.disable_adapter():
                references.append((self._phase_name, torch.equal(output(self.model.eval()), before)))
            self.model.train()
            return super()._compute_loss(*args, **kwargs)

    references = []
    pairs = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}] * 8)
    settings = {"max_steps": 3, "bf16": False, "gradient_checkpointing": False, "learning_rate": 0.05}
    trainer = Spy(
        base,
        args=make_args(tmp_path, cls=trl.DPOConfig, **settings),
        train_dataset=pairs,
        processing_class=of_words(words, eos_token="</s>"),
        peft_config=LotteryTicketConfig(num_weights=40),
        dense_args={"max_steps": 2},
    )
    trainer.train()
    assert references == [("dense", True)] * 2 + [("sparse", True)] * 3
    dense = [entry["rewards/margins"] for entry in trainer.dense_state.log_history if "rewards/margins" in entry]
    assert dense[0] == pytest.approx(0, abs=1e-6)
    # Against a reference that moved along it would be 0 again.
    assert dense[1] > 1e-3
    assert sum(len(values) for _, values in deltas(trainer.model).values()) == 40
    with trainer.model.disable_adapter():
        assert torch.equal(output(trainer.model.eval()), before)
