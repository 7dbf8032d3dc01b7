"""Reading tables of features: every kind of file gives the same table; what is broken is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from peft_sparse import ConfigError, FormatError, load_typology
from tests.support.typology import FEATURES, LANGUAGES, NAMES, VALUES, write_csv, write_json, write_npz

WRITERS = {"npz": write_npz, "json": write_json, "csv": write_csv}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed lang2vec whose import fails, as the real one's does."""
    data = tmp_path / "site" / "lang2vec" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('imported')")
    info = tmp_path / "site" / "lang2vec-1.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lang2vec\nVersion: 1.1.2\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return data


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file(tmp_path, kind):
    typology = load_typology(WRITERS[kind](tmp_path / f"table.{kind}"))
    assert (typology.languages, typology.feature_names) == (tuple(LANGUAGES), tuple(NAMES))
    assert torch.equal(typology.values, torch.tensor(VALUES, dtype=torch.float32))
    assert (typology.source, typology.version, typology.missing) == (f"table.{kind}", None, {})
    assert typology.digest == load_typology(write_json(tmp_path / "same.json")).digest


def test_tabs_and_a_version(tmp_path):
    first = load_typology(write_csv(tmp_path / "a.tsv", separator="\t"))
    second = load_typology(write_json(tmp_path / "b.json", version="4"))
    assert torch.equal(first.values, second.values)
    assert second.version == "4"


def test_the_installed_package_is_read_and_not_imported(installed):
    write_npz(installed / "feature_predictions.npz")
    typology = load_typology()
    assert (typology.source, typology.version) == ("lang2vec", "1.1.2")
    assert torch.equal(typology.vector("eng"), torch.tensor(VALUES[0], dtype=torch.float32))
    assert "lang2vec" not in sys.modules


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("peft_sparse.typology.files.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"need lang2vec's data, .*: pip install lang2vec, name a file .*from_vectors"
    ):
        load_typology()


def test_features_choose_columns_in_their_order(tmp_path):
    for path in (write_npz(tmp_path / "a.npz"), write_json(tmp_path / "b.json")):
        typology = load_typology(path, features=("inventory_knn", "syntax_knn"))
        assert typology.feature_names == ("INV_A", "INV_B", "S_SVO", "S_SOV")
        assert typology.vector("grn").tolist() == [0, 1, 0, 1]


def test_sources_of_a_folder(tmp_path):
    write_npz(tmp_path / "feature_predictions.npz")
    several = np.stack([np.array(VALUES), 1 - np.array(VALUES)], axis=2)
    write_npz(tmp_path / "features.npz", values=several, sources=("ETHNO", "WALS"))
    typology = load_typology(tmp_path, features=("phonology_knn", "syntax_wals"))
    assert typology.feature_names == ("P_VOICE", "S_SVO", "S_SOV")
    assert typology.vector("eng").tolist() == [1, 0, 1]
    with pytest.raises(ConfigError, match=r"features=\['syntax_average'\] need the file feature_averages.npz"):
        load_typology(tmp_path, features=["syntax_average"])
    write_npz(tmp_path / "features.npz", values=several[:2], sources=("ETHNO", "WALS"), languages=LANGUAGES[:2])
    with pytest.raises(FormatError, match="do not describe the same languages"):
        load_typology(tmp_path, features=("phonology_knn", "syntax_wals"))


@pytest.mark.parametrize(
    ("kind", "mark"), [("npz", -1.0), ("npz", float("nan")), ("json", None), ("json", "--"), ("csv", ""), ("csv", "--")]
)
def test_marks_of_missing_values(tmp_path, kind, mark):
    values = [[mark, *VALUES[0][1:]], *VALUES[1:]]
    typology = load_typology(WRITERS[kind](tmp_path / f"table.{kind}", values=values))
    assert typology.missing == {"eng": ("S_SVO",)}
    torch.testing.assert_close(typology.vector("eng")[0], torch.tensor(1 / 3))


@pytest.mark.parametrize("kind", ["npz", "json"])
def test_unknown_features(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"syntax_wals.*phonology"):
        load_typology(WRITERS[kind](tmp_path / f"table.{kind}"), features=["syntax_wals"])
    with pytest.raises(ConfigError, match="features must be a sequence of names of feature sets, got 'syntax_knn'"):
        load_typology(tmp_path / "none", features="syntax_knn")


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", data=np.zeros((1, 1, 1)), langs=np.array([object()]), feats=["a"], sources=["b"])
    with pytest.raises(FormatError, match="holds pickled objects or is damaged, and is not read"):
        load_typology(tmp_path / "a.npz")


def test_broken_files(tmp_path):
    def broken(name: str, text: str, message: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(FormatError, match=message):
            load_typology(tmp_path / name)

    broken("a.npz", "PK\x03\x04 nothing", r"a.npz is not a readable table of features \(BadZipFile")
    broken("a.json", "{", r"a.json is not a readable table of features \(JSONDecodeError")
    broken("b.json", "{}", r"b.json is not a readable table of features \(KeyError")
    broken("a.csv", "code,A\neng,1\nind\n", "all of one length")
    broken("b.csv", "code,A\neng,yes\n", "'yes' is not a number, nor an empty value or '--'")
    np.savez(tmp_path / "c.npz", data=np.zeros((2, 1, 1)), langs=["a"], feats=["S_A"], sources=["predicted"])
    with pytest.raises(FormatError, match=r"shape \[langs, feats, sources\] = \[1, 1, 1\], got \[2, 1, 1\]"):
        load_typology(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", data=np.zeros((2, 1, 1)))
    with pytest.raises(FormatError, match="KeyError"):
        load_typology(tmp_path / "d.npz")
    short = {"features": {name: ["a"] for name in FEATURES}, "vectors": {"eng": {name: [1, 0] for name in FEATURES}}}
    broken("c.json", str(short).replace("'", '"'), "eng has 2 values of syntax_knn, which has 1")
    with pytest.raises(ConfigError, match=r"must be a file that ends in \.npz, \.json, \.csv, \.tsv, or a folder"):
        load_typology(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError):
        load_typology(tmp_path / "missing.json")


@pytest.mark.parametrize("header", ["iso_code,glottocode", "ISO639P3code,ID", "x,Glottocode,ISO639P3code"])
def test_glottocodes_of_a_file(tmp_path, header):
    row = {"iso_code": "ind", "iso639p3code": "ind", "x": "", "glottocode": "indo1316", "id": "indo1316"}
    (tmp_path / "g.csv").write_text(f"{header}\n" + ",".join(row[name.lower()] for name in header.split(",")) + "\n")
    typology = load_typology(write_json(tmp_path / "a.json"), glottocodes=tmp_path / "g.csv")
    assert typology.resolve("indo1316") == "ind"
    assert "stan1293" not in typology


def test_glottocodes_of_an_installed_package(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "urielplus" / "database" / "urielplus_csvs"
    folder.mkdir(parents=True)
    (folder.parents[1] / "__init__.py").write_text("raise ImportError('imported')")
    (folder / "uriel_glottocode_map.csv").write_text("iso_code,glottocode\neng,stan1293\n,none1234\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert load_typology(write_json(tmp_path / "a.json")).glottocodes == {"stan1293": "eng"}


def test_a_file_without_glottocodes(tmp_path):
    (tmp_path / "g.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FormatError, match=r"must have a column of Glottocodes .* it has \['a', 'b'\]"):
        load_typology(write_json(tmp_path / "a.json"), glottocodes=tmp_path / "g.csv")
