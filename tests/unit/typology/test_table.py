"""`Typology`: lookup, missing values, nearness, mixing weights, what is saved and compared."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch

from peft_sparse import ConfigError, FormatError, Typology
from tests.support.typology import LANGUAGES, NAMES, VALUES


def made(values=VALUES, *, languages=LANGUAGES, names=NAMES, **more) -> Typology:
    return Typology.from_vectors(dict(zip(languages, values, strict=True)), feature_names=names, **more)


def test_own_vectors_of_any_kind():
    kinds = {"a": [1, 0], "b": np.array([0.5, 2.0]), "c": torch.tensor([3, 4], dtype=torch.bfloat16)}
    typology = Typology.from_vectors(kinds)
    assert typology.feature_names == ("0", "1")
    assert typology.vectors(["c", "a", "b"]).tolist() == [[3, 4], [1, 0], [0.5, 2]]
    assert typology.values.dtype is torch.float32
    assert (len(typology), typology.source, typology.version) == (3, "own vectors", None)


def test_a_vector_is_a_copy():
    typology = made()
    typology.vector("eng").zero_()
    assert typology.vector("eng").tolist() == VALUES[0]


@pytest.mark.parametrize(
    ("code", "found"),
    [("eng", "eng"), ("EN", "eng"), ("eng_Latn", "eng"), ("gn", "grn"), ("gug", "grn"), ("nah", "nhe"), ("in", "ind")],
)
def test_codes_of_one_language(code, found):
    assert made().resolve(code) == found
    assert code in made()


def test_the_very_code_comes_first():
    typology = made(languages=["en", "eng", "nah", "nhe"])
    assert [typology.resolve(code) for code in ("en", "eng", "nah")] == ["en", "eng", "nah"]
    assert made(languages=["en", "gn", "ind", "x"]).resolve("eng") == "en"


def test_a_stand_in_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        made().vector("nah")
        made().vector("en")
    assert [record.getMessage() for record in caplog.records] == ["own vectors has no nah; nhe stands for it"]


def test_unknown_codes():
    typology = made(source="table", version="2")
    with pytest.raises(ConfigError, match=r"'enm' is not among the 4 of table 2. Spelt alike: \['eng'\]. Give its ISO"):
        typology.vector("enm")
    with pytest.raises(ConfigError, match=r"'stan1293' .* no table of Glottocodes is at hand: pip install urielplus"):
        typology.vector("stan1293")
    assert "xyz" not in typology
    assert 3 not in typology


def test_missing_values_are_means_and_are_reported(caplog):
    nan = math.nan
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        typology = made([[1, nan, 0], [0, nan, 1], [nan, nan, nan], [nan, nan, 0]], names=["a", "b", "c"])
    assert typology.languages == ("eng", "grn", "nhe")  # nothing is known of ind
    assert typology.vector("nhe").tolist() == [0.5, 0, 0]
    assert typology.missing == {"eng": ("b",), "grn": ("b",), "nhe": ("a", "b")}
    (record,) = caplog.records
    assert record.getMessage() == (
        "own vectors: 4 of 9 values are missing, in 3 of 3 languages; they are set to the feature's mean"
    )


@pytest.mark.parametrize(
    ("vectors", "names", "message"),
    [
        ({}, None, r"one or more and of one length, got lengths \[\]"),
        ({"a": [], "b": []}, None, r"one or more and of one length, got lengths \[0\]"),
        ({"a": [1], "b": [1, 2]}, None, r"of one length, got lengths \[1, 2\]"),
        ({"a": [1, 2]}, ["x"], "feature_names must be one per feature, got 1 names for 2"),
        ({"a": [1, 2]}, ["x", "x"], r"feature_names of own vectors must be .* all different, got \['x'\] twice"),
        ({"a": [1, math.inf]}, None, r"vectors must be finite, .* those of \['a'\] are not"),
    ],
)
def test_vectors_that_are_refused(vectors, names, message):
    with pytest.raises(ConfigError, match=message):
        Typology.from_vectors(vectors, feature_names=names)


def test_nearest_languages():
    typology = made()
    # Against eng = 10110: grn 01101 shares 1 of 3 and 3, ind 10100 2 of 3 and 2, nhe 01011 1 of 3 and 3.
    assert typology.nearest_languages("en", 9) == [
        ("ind", pytest.approx(1 - 2 / math.sqrt(6))),
        ("grn", pytest.approx(1 - 1 / 3)),
        ("nhe", pytest.approx(1 - 1 / 3)),
    ]
    assert [code for code, _ in typology.nearest_languages("eng", 1)] == ["ind"]
    assert typology.nearest_languages("eng", among=["nah", "en"]) == [("en", 0), ("nah", pytest.approx(2 / 3))]
    with pytest.raises(ConfigError, match="n must be 1 or more, got 0"):
        typology.nearest_languages("eng", 0)
    with pytest.raises(ConfigError, match="'xyz' is not among"):
        typology.nearest_languages("eng", among=["xyz"])


def test_a_vector_of_zeros_is_near_nothing():
    assert Typology.from_vectors({"a": [0, 0], "b": [1, 0]}).nearest_languages("a") == [("b", 1)]


def test_mixing_weights():
    typology = made()
    weights = typology.mixing_weights("eng", ["nhe", "id"], temperature=0.5)
    ratio = math.exp((2 / math.sqrt(6) - 1 / 3) / 0.5)
    assert list(weights.items()) == [
        ("id", pytest.approx(ratio / (1 + ratio))),
        ("nhe", pytest.approx(1 / (1 + ratio))),
    ]
    assert typology.mixing_weights("eng", ["nhe", "id"], n=1) == {"id": 1}
    with pytest.raises(ConfigError, match="sources must name at least one language"):
        typology.mixing_weights("eng", [])
    with pytest.raises(ConfigError, match="temperature must be > 0, got 0"):
        typology.mixing_weights("eng", ["nhe"], temperature=0)


def test_the_digest_is_of_names_and_values():
    reference = made().digest
    assert len(reference) == 64
    assert made(VALUES[::-1], languages=LANGUAGES[::-1], source="x", version="2").digest == reference
    changed = [[0, *VALUES[0][1:]], *VALUES[1:]]
    others = [made(changed), made(names=[*NAMES[:4], "x"]), made(languages=["deu", *LANGUAGES[1:]]), made(VALUES[::-1])]
    assert len({reference, *(other.digest for other in others)}) == 5
    assert (
        made([[-0.0, 1.0]], languages=["a"], names=["x", "y"]).digest
        == made([[0.0, 1.0]], languages=["a"], names=["x", "y"]).digest
    )


def test_saved_and_read_again():
    typology = made(source="table", version="2")
    saved = json.loads(json.dumps(typology.to_dict(languages=["nah", "en"])))
    assert saved["vectors"] == {"eng": "b0", "nhe": "58"}
    assert (saved["digest"], saved["source"], saved["version"]) == (typology.digest, "table", "2")
    again = Typology.from_dict(saved)
    assert again.languages == ("eng", "nhe")
    assert again.feature_names == typology.feature_names
    assert torch.equal(again.vectors(["eng", "nhe"]), typology.vectors(["eng", "nhe"]))
    typology.require_same(saved)
    again.require_same(saved)


def test_values_that_are_not_bits_are_saved_as_they_are():
    typology = Typology.from_vectors({"a": [0.1, 2.0, -3e-9], "b": [1, 0, 1]})
    saved = json.loads(json.dumps(typology.to_dict(languages=["a", "b"])))
    assert Typology.from_dict(saved).digest == typology.digest


def test_another_typology_is_refused():
    typology = made(source="table", version="2")
    whole, part = typology.to_dict(), typology.to_dict(languages=["eng"])
    few = made(VALUES[:2], languages=LANGUAGES[:2])
    few.require_same(part)
    with pytest.raises(ConfigError, match=r"not those of table 2: own vectors has the digest \w{12}, not \w{12}"):
        few.require_same(whole)
    changed = made([[0, *VALUES[0][1:]], *VALUES[1:]])
    with pytest.raises(ConfigError, match=r"vectors of \['eng'\] \(1 of 1 languages\) are not those of table 2"):
        changed.require_same(part)
    for names, difference in [(NAMES[::-1], "'INV_B' in place 0, not 'S_SVO'"), ([*NAMES[:4], "x"], "'x' in place 4")]:
        with pytest.raises(
            ConfigError, match=f"must be those of table 2 .5., in their order; own vectors has {difference}"
        ):
            made(names=names).require_same(part)
    with pytest.raises(ConfigError, match="has 3 features"):
        made([row[:3] for row in VALUES], names=NAMES[:3]).require_same(part)


@pytest.mark.parametrize("code", ["en", "EN", "eng_Latn"])
def test_another_typology_is_refused_whatever_a_language_was_called(code):
    # As an adapter keeps the vector of a language that it was asked for.
    typology = made()
    saved = typology.to_dict(languages=["eng"])
    saved["vectors"] = {code: saved["vectors"]["eng"]}
    typology.require_same(saved)
    with pytest.raises(ConfigError, match=rf"vectors of \['{code}'\] \(1 of 1 languages\) are not those of"):
        made([[0, *VALUES[0][1:]], *VALUES[1:]]).require_same(saved)


def test_a_typology_without_the_saved_languages_is_told(caplog):
    saved = made().to_dict(languages=["eng"])
    with caplog.at_level("WARNING", logger="peft_sparse"):
        made(VALUES[1:2], languages=["quy"]).require_same(saved)
    assert "none of the languages ['eng']" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "must have format 1, got 2: a newer peft_sparse"),
        ({"vectors": {"eng": "b0b0"}}, "must have the typology's 5 features, got 16 bits"),
        ({"vectors": {"eng": [1, 0]}}, "must have the typology's 5 features, got 2"),
        ({"vectors": {"eng": "zz"}}, "must be hexadecimal digits or numbers, got 'zz'"),
        ({"vectors": {"eng": 3}}, "must be what Typology.to_dict gives"),
        ({"vectors": None}, "must be what Typology.to_dict gives"),
        ({"vectors": {}}, "keeps no vectors: give the data"),
    ],
)
def test_broken_saved_forms(changes, message):
    with pytest.raises(FormatError, match=message):
        Typology.from_dict({**made().to_dict(languages=["eng"]), **changes})
    with pytest.raises(FormatError, match=r"must be what Typology\.to_dict gives"):
        made().require_same({})
