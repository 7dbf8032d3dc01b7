"""Attachment scores against an evaluator that reads CoNLL-U as the shared tasks' does: by lines and columns."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from peft_sparse import attachment_scores
from peft_sparse.errors import ConfigError
from peft_sparse.parsing import attachment_metrics


def conllu(parses) -> str:
    blocks = []
    for heads, relations in parses:
        rows = [
            f"{i}\tw{i}\t_\t_\t_\t_\t{head}\t{relation}\t_\t_"
            for i, (head, relation) in enumerate(zip(heads, relations, strict=True), start=1)
        ]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n\n"


def evaluate(system: str, gold: str) -> tuple[float, float]:
    """(UAS, LAS) of two files with the same words, by their columns HEAD and DEPREL."""
    counted = heads = both = 0
    for own, right in zip(system.split("\n"), gold.split("\n"), strict=True):
        if not right:
            assert not own
            continue
        own_columns, right_columns = own.split("\t"), right.split("\t")
        assert own_columns[:2] == right_columns[:2]
        counted += 1
        if own_columns[6] == right_columns[6]:
            heads += 1
            if own_columns[7] == right_columns[7]:
                both += 1
    return heads / counted, both / counted


def random_parses(seed: int) -> list[tuple[list[int], list[str]]]:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 9) for _ in range(20)]
    return [([chance.randint(0, n) for _ in range(n)], chance.choices("abc", k=n)) for n in lengths]


def altered(parses, seed: int):
    chance = random.Random(seed)
    return [
        (
            [h if chance.random() < 0.6 else chance.randint(0, len(heads)) for h in heads],
            [r if chance.random() < 0.6 else chance.choice("abc") for r in relations],
        )
        for heads, relations in parses
    ]


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_the_independent_evaluators(seed):
    gold = random_parses(seed)
    system = altered(gold, seed)
    uas, las = evaluate(conllu(system), conllu(gold))
    found = attachment_scores(system, gold)
    assert (found["uas"], found["las"]) == (pytest.approx(uas), pytest.approx(las))
    assert 0 < las < uas < 1


def test_words_on_the_root_count_unless_they_are_left_out():
    gold = [([2, 0, 2], ["det", "root", "obj"])]
    system = [([2, 3, 2], ["det", "root", "nsubj"])]
    assert attachment_scores(system, gold) == {"uas": pytest.approx(2 / 3), "las": pytest.approx(1 / 3)}
    assert attachment_scores(system, gold, roots=False) == {"uas": 1.0, "las": 0.5}
    assert np.isnan(attachment_scores([([1], ["a"])], [([0], ["a"])], roots=False)["uas"])


def test_padding_does_not_count_in_a_trainers_metrics():
    gold = (np.array([[0, 1, -100], [2, 0, 2]]), np.array([[3, 1, -100], [0, 3, 1]]))
    system = (np.array([[0, 2, 0], [2, 0, 1]]), np.array([[3, 1, 3], [0, 3, 1]]))
    found = attachment_metrics(SimpleNamespace(predictions=system, label_ids=gold))
    assert found == {"uas": pytest.approx(3 / 5), "las": pytest.approx(3 / 5)}
    found = attachment_metrics(SimpleNamespace(predictions=system, label_ids=gold), roots=False)
    assert found == {"uas": pytest.approx(1 / 3), "las": pytest.approx(1 / 3)}


def test_sentences_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="as many sentences as gold, got 1 and 2"):
        attachment_scores([([0], ["a"])], [([0], ["a"])] * 2)
    with pytest.raises(ConfigError, match=r"sentence 0: .* must be as many, got \[1, 1, 2, 2\]"):
        attachment_scores([([0], ["a"])], [([0, 1], ["a", "b"])])


def test_names_are_not_compared_with_ids():
    with pytest.raises(ConfigError, match="names in both or ids in both"):
        attachment_scores([([0, 1], [3, 1])], [([0, 1], ["root", "det"])])
    with pytest.raises(ConfigError, match="heads must be numbers"):
        attachment_scores([([0, 1], ["root", "det"])], [(["0", "1"], ["root", "det"])])
