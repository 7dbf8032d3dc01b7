"""The transfer of part-of-speech tags, rehearsed; its loss on masked tokens alone, and its errors over sentences."""

from __future__ import annotations

import json

import _bench_runs  # noqa: F401  (the examples' folder comes into the path with it)
import numpy as np
import pos_transfer
import pytest
import torch
from _masked_training import masked_nll
from _recipes import LANGUAGE
from _report import paired_bootstrap
from peft import get_peft_model
from transformers import BertConfig, BertForMaskedLM

from peft_sparse import RandConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_a_rehearsal_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    arguments = ["--tiny", "--methods", "lt_sft", "--output", str(tmp_path / "pos.jsonl")]
    pos_transfer.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "pos.jsonl").read_text().splitlines()]
    kinds = [(line["kind"], line["over"], line["language"], line["way"]) for line in lines]
    languages = [("language", None, code, None) for code in ("near", "far")]
    tags = [
        ("tags", over, code, way)
        for over in ("source", "bare")
        for code, ways in (("near", ["none", "own"]), ("far", ["none", "source", "own"]))
        for way in ways
    ]
    assert kinds == languages + tags
    far = [line for line in lines if line["kind"] == "tags" and line["language"] == "far"]
    words = [len(row["tokens"]) for row in pos_transfer.invented()[0].test["far"]]
    for line in far:
        assert len(line["right"]) == len(words) == 20
        assert all(0 <= right <= most for right, most in zip(line["right"], words, strict=True))
        assert line["accuracy"] == pytest.approx(100 * sum(line["right"]) / sum(words))
    table = (tmp_path / "pos.md").read_text()
    accuracies = {(line["over"], line["way"]): line["accuracy"] for line in far}
    row = next(line for line in table.splitlines() if line.startswith("| lt_sft | source |"))
    shown = [f"{accuracies['source', way]:.1f}" for way in ("none", "source", "own")]
    assert [cell.strip() for cell in row.split("|")[5:8]] == shown

    # Again: nothing is trained, and nothing measured.
    monkeypatch.setattr(pos_transfer.Shop, "_fit", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(pos_transfer.Bench, "tested", lambda *args: pytest.fail("tested again"))
    pos_transfer.main(arguments)
    assert (tmp_path / "pos.md").read_text() == table
    monkeypatch.undo()

    # Fewer weights, beside the results of more.
    pos_transfer.main([*arguments, "--language-density", "0.0005", "--than-density", str(LANGUAGE.density)])
    lines = [json.loads(line) for line in (tmp_path / "pos.jsonl").read_text().splitlines()]
    more, fewer = (
        line["accuracy"] for line in lines if (line["over"], line["language"], line["way"]) == ("source", "far", "own")
    )
    row = next(line for line in (tmp_path / "pos.md").read_text().splitlines() if line.startswith("| H5"))
    assert fewer < more
    assert f"{fewer - more:+.1f} (" in row
    capsys.readouterr()


def test_masked_tokens_alone_give_the_same_loss_and_gradients():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(
        BertConfig(vocab_size=41, **size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    # The output matrix is tied to the embedding, which is tuned.
    config = RandConfig(density=0.2, target_modules="all", target_norms=False, init_weights=False)
    tuned = get_peft_model(model, config)
    ids = torch.randint(5, 41, (4, 9))
    labels = torch.where(torch.rand(4, 9) < 0.4, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def gradients(loss):
        tuned.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in tuned.parameters() if p.requires_grad]

    plain = tuned(**batch).loss
    expected = gradients(plain)
    total, count = masked_nll(tuned, dict(batch))
    found = gradients(total / count)
    assert count == int((labels >= 0).sum())
    torch.testing.assert_close(total / count, plain)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other)


def test_a_standard_error_is_over_sentences():
    chance = np.random.default_rng(0)
    words = chance.integers(5, 30, size=400).tolist()
    # Sentences are all right or all wrong, so words of one sentence are worth one.
    right = [n if chance.random() < 0.5 else 0 for n in words]
    none = [0] * len(words)
    found = paired_bootstrap(words, right, none, pos_transfer.accuracy, resamples=1000)
    assert found.mean == pytest.approx(100 * sum(right) / sum(words))
    ratio = sum(right) / sum(words)
    residuals = np.array(right) - ratio * np.array(words)
    expected = 100 * np.sqrt((residuals**2).sum()) / sum(words)
    assert found.error == pytest.approx(expected, rel=0.15)
    # Over words it would be a quarter of that.
    assert found.error > 3 * 100 * np.sqrt(ratio * (1 - ratio) / sum(words))


def test_raw_text_of_a_treebank_is_its_sentences(tmp_path):
    path = tmp_path / "x.conllu"
    path.write_text("# sent_id = 1\n# text = Il-kelb = kbir.\n1\tIl-\t_\n\n# text = Tajjeb\n1\tTajjeb\t_\n")
    assert pos_transfer.sentences(path) == ["Il-kelb = kbir.", "Tajjeb"]
