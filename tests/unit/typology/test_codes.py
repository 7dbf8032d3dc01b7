"""Language codes: what is the same language, and what stands for it."""

from __future__ import annotations

import pytest

from peft_sparse.typology.codes import ISO_639_1, ISO_639_2_B, STAND_INS, is_glottocode, spellings, stand_ins


def test_the_two_letter_codes_are_all_there():
    withdrawn = {"in", "iw", "ji", "jw", "mo"}
    assert len(ISO_639_1.keys() - withdrawn) == 184
    assert withdrawn <= ISO_639_1.keys()
    assert {len(code) for code in ISO_639_1} == {2}
    assert {len(code) for code in ISO_639_1.values()} == {3}
    assert len(ISO_639_2_B) == 20
    assert not ISO_639_2_B.keys() & set(ISO_639_1.values())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("en", ["en", "eng"]),
        ("eng", ["eng", "en"]),
        ("EN-gb", ["EN-gb", "en", "eng"]),
        ("eng_Latn", ["eng_Latn", "eng", "en"]),
        ("ger", ["ger", "deu", "de"]),
        ("iw", ["iw", "heb", "he"]),
        ("gn", ["gn", "grn"]),
        ("quy", ["quy"]),
    ],
)
def test_spellings(code, expected):
    assert spellings(code) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("nah", ["nhe", "nhn", "nci"]),
        ("oto", ["ote", "otm"]),
        ("btk", ["bbc"]),
        ("ay", ["ayr"]),
        ("gug", ["grn", "gn"]),
        ("quy", []),
    ],
)
def test_stand_ins(code, expected):
    assert stand_ins(code) == expected


def test_no_stand_in_is_a_language_of_another_group():
    members = [member for group in STAND_INS.values() for member in group]
    assert len(members) == len(set(members))
    assert "nhd" not in members  # Chiripá, for all its letters


def test_glottocodes():
    assert [is_glottocode(code) for code in ("stan1293", "b10b1234", "eng", "stan129", "stan12934")] == [
        *(True, True, False, False, False)
    ]
