"""A file of the structure of composable-sft's published parsers, imported: it parses as the original does."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import BertConfig, BertModel

from peft_sparse import BiaffineParser, import_adapter
from peft_sparse.parsing import RELATIONS
from tests.support.foreign_files import IDS, SIZES, add, differences, heads_of, write_diff

PUBLISHED = {"root": "pooled", "roots": False}


def test_a_published_parser_is_imported_and_parses_as_it_did(tmp_path):
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "mbert")
    original = BiaffineParser.from_pretrained(tmp_path / "mbert", **PUBLISHED).eval()
    moved, heads = differences(original), heads_of(original)
    assert {name: tuple(head.shape) for name, head in heads.items()} == {
        "biaffine_arcs.weight": (1, 17, 16),
        "biaffine_rels.weight": (38, 17, 17),
    }
    folder = write_diff(tmp_path / "mbert-task-sft-dp", moved, heads)
    original.load_state_dict(add(original, moved, heads), strict=False)

    result = import_adapter(folder, tmp_path / "imported", base=tmp_path / "mbert")
    assert result.heads == BiaffineParser.HEADS
    assert result.labels == RELATIONS
    fresh = BiaffineParser.from_pretrained(tmp_path / "mbert", **PUBLISHED)
    tuned = PeftModel.from_pretrained(fresh, tmp_path / "imported").eval()
    inputs = {"input_ids": IDS, "word_ids": torch.tensor([[-1, 0, 0, 1, 2, 2, 3, 4, 5, -1]])}
    with torch.no_grad():
        expected, found = original(**inputs, output_scores=True), tuned(**inputs, output_scores=True)
    assert expected.arc_scores.std() > 0
    assert torch.equal(found.arc_scores, expected.arc_scores)
    assert torch.equal(found.relation_scores, expected.relation_scores)
    assert torch.equal(found.arcs, expected.arcs)
