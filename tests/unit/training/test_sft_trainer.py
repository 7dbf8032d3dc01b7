from __future__ import annotations

import pickle
import sys

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback

from peft_sparse import AdaSftConfig, LotteryTicketConfig, OneShotConfig, RandConfig
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from tests.support.models import llama
from tests.support.tokenizers import of_words
from tests.support.training import assert_same_tensors, base_weights, deltas, make_args

trl = pytest.importorskip("trl")

TEXTS = [
    "the old cat sees a red bird",
    "a young dog hears the blue cat",
    "the bird likes a dog",
    "a cat likes the old dog",
]
WORDS = ["<pad>", "<eos>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]


def make_llama():
    special = {"eos_token_id": 1, "pad_token_id": 0}
    return llama(vocab_size=len(WORDS), num_key_value_heads=2, tie_word_embeddings=True, **special).train()


def make_data():
    return Dataset.from_dict({"text": TEXTS * 3})


def make_trainer(folder, model, *, peft_config=None, dense_args=None, mask_args=None, callbacks=None, **changes):
    from peft_sparse.training.trainer.trainer import SparseSFTTrainer

    settings = {"max_steps": 4, "bf16": False, "gradient_checkpointing": False, "max_length": 16, **changes}
    return SparseSFTTrainer(
        model=model,
        args=make_args(folder, cls=trl.SFTConfig, **settings),
        train_dataset=make_data(),
        processing_class=of_words(WORDS, eos_token="<eos>"),
        peft_config=peft_config,
        dense_args=None if mask_args else dense_args or {"max_steps": 3},
        mask_args=mask_args,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_selection_by_gradients(tmp_path, checkpointing):
    config = OneShotConfig(num_weights=60, criterion="weight_times_gradient", selection_batches=2)
    trainer = make_trainer(
        tmp_path / "run", make_llama(), peft_config=config, gradient_checkpointing=checkpointing, max_steps=2
    )
    trainer.train()
    chosen = deltas(trainer.model)
    assert sum(values.numel() for _, values in chosen.values()) == 60
    assert all((values != 0).all() for _, values in chosen.values())
    # By hand: the mean gradients of the same two batches.
    twin = make_trainer(tmp_path / "twin", make_llama(), peft_config=config, max_steps=2)
    plain = make_llama().requires_grad_(True)
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    torch.manual_seed(twin.args.seed)
    batches = [batch for batch, _ in zip(twin.get_train_dataloader(), range(2), strict=False)]
    # The selection's passes over the data are not counted.
    assert trainer.state.log_history[0]["num_tokens"] == batches[0]["attention_mask"].sum()
    for batch in batches:
        plain(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
    scores = {n: (plain.get_parameter(n) * plain.get_parameter(n).grad).abs().flatten() for n in chosen}
    threshold = torch.cat(list(scores.values())).topk(60).values.min()
    for name, (indices, _) in chosen.items():
        assert set(indices.tolist()) == set((scores[name] >= threshold).nonzero().squeeze(1).tolist()), name


@pytest.mark.parametrize("wrapped_by", ["trainer", "user"])
def test_two_phases(tmp_path, wrapped_by):
    config = LotteryTicketConfig(num_weights=60, target_modules="all-linear", exclude_modules=["lm_head"])
    model = make_llama() if wrapped_by == "trainer" else get_peft_model(make_llama(), config)
    trainer = make_trainer(tmp_path, model, peft_config=config if wrapped_by == "trainer" else None)
    before = base_weights(trainer.model)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert (trainer.dense_state.global_step, trainer.state.global_step) == (3, 4)
    assert sum(values.numel() for _, values in deltas(trainer.model).values()) == 60
    assert sum(trainer.model.peft_config["default"].counts.values()) == 60
    assert_same_tensors(base_weights(trainer.model), before)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["phase"] == "sparse" and "mean_token_accuracy" in entry for entry in logged)
    assert all((values != 0).all() for _, values in deltas(trainer.model).values())


def test_soft_masks_and_gradient_checkpointing(tmp_path):
    config = AdaSftConfig()
    masks = {"max_steps": 3, "learning_rate": 1e-1}
    trainer = make_trainer(tmp_path, make_llama(), peft_config=config, mask_args=masks, gradient_checkpointing=True)
    trainer.train()
    assert (trainer.mask_state.global_step, trainer.state.global_step) == (3, 4)
    assert trainer.model.peft_config["default"].phase == "weights"
    for _, _, masked in iter_masked(trainer.model):
        assert masked.scores.any()
        assert masked.difference.any()
    assert all(entry["phase"] == "weights" for entry in trainer.state.log_history if "loss" in entry)


def test_embeddings_tied_to_the_output(tmp_path):
    """TRL reads the output matrix itself; it stays pristine in the dense phase and is tied again after it."""
    config = LotteryTicketConfig(num_weights=30, target_modules=["embed_tokens", "q_proj"])
    seen = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.base_model.model.lm_head.weight.detach().clone())

    trainer = make_trainer(tmp_path, make_llama(), peft_config=config, callbacks=[Spy()], dense_args={"max_steps": 2})
    base = trainer.model.base_model.model
    start = base.lm_head.weight.detach().clone()
    trainer.train()
    assert len(seen) == 6
    assert all(torch.equal(matrix, start) for matrix in seen)
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    assert trainer.model.peft_config["default"].counts["model.embed_tokens.weight"] > 0


def test_gradient_checkpointing_resume_and_best_model(tmp_path):
    class Killed(BaseException):
        pass

    class KillAt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and kill.phase == trainer._phase_name:
                raise Killed

    def run(folder, *, callbacks=None):
        config = LotteryTicketConfig(num_weights=60, target_modules="all-linear", exclude_modules=["lm_head"])
        return make_trainer(
            folder,
            make_llama(),
            peft_config=config,
            dense_args={"max_steps": 4},
            save_strategy="steps",
            save_steps=2,
            gradient_checkpointing=True,
            callbacks=callbacks,
        )

    uninterrupted = run(tmp_path / "whole")
    uninterrupted.train()
    kill = KillAt()
    for phase in ("dense", "sparse"):
        kill.phase = phase
        trainer = run(tmp_path / phase, callbacks=[kill])
        with pytest.raises(Killed):
            trainer.train()
        resumed = run(tmp_path / phase)
        resumed.train(resume_from_checkpoint=True)
        assert_same_tensors(deltas(resumed.model), deltas(uninterrupted.model))


def test_rand_sft_trains_in_one_phase(tmp_path):
    trainer = make_trainer(tmp_path, make_llama(), peft_config=RandConfig(density=0.05))
    trainer.train()
    assert trainer.dense_state is None
    assert all("phase" not in entry for entry in trainer.state.log_history)


def test_the_class_is_found_by_name():
    from peft_sparse.training.trainer import trainer

    made = trainer.SparseSFTTrainer
    assert made is trainer.sparse_trainer(trl.SFTTrainer)
    assert made.__name__ == "SparseSFTTrainer"
    assert pickle.loads(pickle.dumps(made)) is made


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    from peft_sparse.training.trainer import trainer

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"SparseSFTTrainer needs TRL .*: pip install 'peft-sparse\[trl\]'"):
        _ = trainer.SparseSFTTrainer


def test_the_package_offers_the_names():
    import peft_sparse
    from peft_sparse.training.phases import lottery
    from peft_sparse.training.trainer import trainer

    for name in ("start_dense_phase", "select", "start_sparse_phase"):
        assert getattr(peft_sparse, name) is getattr(lottery, name)
    for name in ("SparseTrainer", "SparseSFTTrainer", "sparse_trainer"):
        assert getattr(peft_sparse, name) is getattr(trainer, name)
    assert {"SparseTrainer", "SparseSFTTrainer", "sparse_trainer"} <= set(peft_sparse.__all__)
    with pytest.raises(AttributeError, match="module 'peft_sparse' has no attribute 'SparseDPOTrainer'"):
        _ = peft_sparse.SparseDPOTrainer
