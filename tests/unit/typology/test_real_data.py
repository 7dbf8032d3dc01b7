"""URIEL's real vectors, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peft_sparse import load_typology

pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def typology():
    folder = os.environ.get("PEFT_SPARSE_DATA")
    if not folder:
        pytest.skip("PEFT_SPARSE_DATA does not name the data folder")
    path = Path(folder, "lang2vec", "uriel_knn.json")
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return load_typology(path)


def test_the_289_features(typology):
    prefixes = [name.partition("_")[0] for name in typology.feature_names]
    assert (prefixes.count("S"), prefixes.count("P"), prefixes.count("INV")) == (103, 28, 158)
    assert typology.missing == {}
    assert {code for code in ("eng", "ace", "quy", "cni", "hch", "bbc", "bxr", "mlt", "ayr") if code in typology} == {
        *("eng", "ace", "quy", "cni", "hch", "bbc", "bxr", "mlt", "ayr")
    }
    assert set(typology.values.unique().tolist()) == {0.0, 1.0}


def test_neighbours_are_kin(typology):
    austronesian = {"bjn", "min", "ban", "bug", "ind", "sun", "nij", "mad", "jav", "bbc"}
    assert {code for code, _ in typology.nearest_languages("ace", 8)} <= austronesian
    nearest = [code for code, _ in typology.nearest_languages("eng", 3, among=["fao", "hau", "quy", "wol", "mlt"])]
    assert nearest[0] == "fao"
    assert typology.nearest_languages("aym", 1)[0] == ("ayr", 0.0)


def test_weights_prefer_kin(typology):
    weights = typology.mixing_weights("ace", ["eng", "ind", "jav", "min", "spa"])
    assert list(weights) == ["min", "ind", "jav", "eng", "spa"]
    assert sum(weights.values()) == pytest.approx(1)
