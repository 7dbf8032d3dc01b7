"""Distillation in sparse trainers: both phases of lottery tickets, and criteria of gradients, go by the teacher."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import (
    DeftXConfig,
    LotteryTicketConfig,
    OneShotConfig,
    SparseTrainer,
    iter_deltas,
    sparse_trainer,
)
from peft_sparse.distillation import DistillationTrainer, Teacher, distilled_trainer, make_student
from tests.support.distillation import BATCH, classifier, make_trainer


@pytest.mark.parametrize(
    "order", [lambda: distilled_trainer(SparseTrainer), lambda: sparse_trainer(DistillationTrainer)]
)
def test_both_phases_of_a_lottery_ticket_go_by_the_teacher(order, tmp_path):
    base = classifier()
    config = LotteryTicketConfig(num_weights=60, modules_to_save=["classifier"])
    student = get_peft_model(make_student(base, stride=2), config)
    frozen = {name: tensor.clone() for name, tensor in student.base_model.model.bert.state_dict().items()}
    trainer = make_trainer(
        tmp_path, student, Teacher(base), cls=order(), labels=True, loss="teacher_forcing", dense_args={"max_steps": 2}
    )
    trainer.train()
    history = [*trainer.dense_state.log_history, *trainer.state.log_history]
    logged = [entry for entry in history if "loss" in entry]
    assert [entry["phase"] for entry in logged] == ["dense", "dense", "sparse", "sparse"]
    for entry in logged:
        terms = sum(entry[f"loss_{name}"] for name in ("attention", "hidden", "prediction"))
        assert entry["loss"] == pytest.approx(terms, rel=1e-3)
    assert sum(student.peft_config["default"].counts.values()) == 60
    kept = {n: t for n, t in student.base_model.model.bert.state_dict().items() if n in frozen and "sparse_ft" not in n}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in kept.items())
    student.save_pretrained(tmp_path / "task")
    plain = PeftModel.from_pretrained(make_student(classifier(), stride=2), tmp_path / "task").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**BATCH).logits, student.eval()(**BATCH).logits)


TICKETS = {
    "LT-SFT": lambda **fields: LotteryTicketConfig(**fields),
    "SC-SFT": lambda **fields: LotteryTicketConfig(**fields, budget={r"layer\.0\.": 0.75, r"^(?!.*layer\.0\.)": 0.25}),
    "DeFT-X": lambda **fields: DeftXConfig(**fields, rank=2, residual_density=0.3),
}


# Changes as large as gradients: Adam's first steps are all of one size.
PLAIN_STEPS = {"optim": "sgd", "learning_rate": 0.1}


def selected_by_hand(name: str, folder, base, teacher) -> dict[str, list[int]]:
    """What a full-rank run under the distillation loss says of a ticket's 60 weights."""
    student = make_student(base, stride=2)
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    trainer = make_trainer(
        folder, student, Teacher(teacher), labels=True, loss="teacher_forcing", **PLAIN_STEPS, max_steps=3
    )
    trainer.train()
    moved = {n: (p.detach() - before[n]) for n, p in student.named_parameters() if n.startswith("bert.")}
    scores = {}
    for key, change in moved.items():
        if name == "DeFT-X" and change.dim() == 2 and "embeddings" not in key:
            left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
            leading = (left[:, :2] * values[:2]) @ right[:2]
            rest = change.double() - leading
            kept = rest.abs().flatten().topk(round(0.3 * rest.numel())).indices
            whole = leading.flatten()
            whole[kept] = change.double().flatten()[kept]
            change = whole.reshape(change.shape)
        scores[key] = change.double().abs().flatten()
    groups = [(60, list(scores))]
    if name == "SC-SFT":
        first = [key for key in scores if "layer.0." in key]
        groups = [(45, first), (15, [key for key in scores if key not in first])]
    chosen: dict[str, list[int]] = {key: [] for key in scores}
    for count, keys in groups:
        every = torch.cat([scores[key] for key in keys])
        places = [(key, index) for key in keys for index in range(scores[key].numel())]
        for place in every.topk(count).indices.tolist():
            chosen[places[place][0]].append(places[place][1])
    return {key: sorted(indices) for key, indices in chosen.items()}


@pytest.mark.parametrize("name", [pytest.param(t, marks=[pytest.mark.slow] * (t != "LT-SFT")) for t in TICKETS])
def test_every_ticket_is_drawn_by_the_distillation_loss(name, tmp_path):
    base, teacher = classifier(), classifier(initializer_range=0.5)
    config = TICKETS[name](
        num_weights=60, target_modules="all", target_biases=True, target_norms=True, modules_to_save=["classifier"]
    )
    student = get_peft_model(make_student(base, stride=2), config)
    trainer = make_trainer(
        tmp_path, student, Teacher(teacher), cls=distilled_trainer(SparseTrainer), labels=True,
        loss="teacher_forcing", **PLAIN_STEPS, dense_args={"max_steps": 3},
    )  # fmt: skip
    trainer.train()
    found = {key: delta.indices.tolist() for key, _, _, delta in iter_deltas(student, "default")}
    expected = selected_by_hand(name, tmp_path, classifier(), teacher)
    assert {key: indices for key, indices in found.items() if indices} == {k: v for k, v in expected.items() if v}
    labels = selected_by_hand(name, tmp_path, classifier(), classifier(initializer_range=0.2))
    assert labels != expected  # another teacher, other weights


def test_gradients_of_the_distillation_loss_choose_weights(tmp_path):
    base = classifier()
    chosen = []
    for loss in ("teacher_forcing", "self_taught"):
        config = OneShotConfig(num_weights=40, criterion="fisher", modules_to_save=["classifier"])
        student = get_peft_model(make_student(base, stride=2), config)
        teacher = Teacher(classifier(initializer_range=0.5))
        trainer = make_trainer(tmp_path, student, teacher, cls=distilled_trainer(SparseTrainer), labels=True, loss=loss)
        trainer.train()
        chosen.append({name: delta.indices.tolist() for name, _, _, delta in iter_deltas(student, "default")})
        assert sum(map(len, chosen[-1].values())) == 40
    assert chosen[0] != chosen[1]
