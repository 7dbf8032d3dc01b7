"""What the examples read: every kind of file and the Hub, with errors that name what is there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from typer import BadParameter

datasets = pytest.importorskip("datasets", reason="the examples extra has datasets")
EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [{"text": "NA", "label": "007"}, {"text": 'two,\n"lines"', "label": "1"}, {"text": "café", "label": "x"}]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in [name for name, module in sys.modules.items() if str(EXAMPLES) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows), encoding="utf-8-sig")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        quoted = [
            ['"' + str(cell).replace('"', '""') + '"' for cell in row] for row in ([*rows[0]], *map(dict.values, rows))
        ]
        path.write_text("\n".join(mark.join(row) for row in quoted), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_table_is_read_as_it_is_written(modules, tmp_path, suffix):
    path = write(tmp_path / f"rows [1].{suffix}", ROWS)
    assert modules("_readers").read_file(path) == ROWS


def test_a_text_file_is_a_row_a_line(modules, tmp_path):
    path = write(tmp_path / "a.txt", [{"text": "one"}, {"text": "two "}])
    assert modules("_readers").read_file(path) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3: not as many cells as the header has"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv, line 2: not as many cells as the header has"),
        ("a.tsv", b'a\tb\n"open\t2\n', r"a\.tsv, line \d: unexpected end of data"),
        ("a.txt", "café".encode("latin-1"), r"a\.txt is not in UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a"\n', r"a\.jsonl, line 2: no JSON"),
        ("a.parquet", b"no such thing", r"a\.parquet, which is no Parquet file: "),
        ("a.json", b"{", r"a\.json, line 1: no JSON"),
        ("a.json", b"[1]", r"a\.json, which is no list of JSON objects"),
        ("a.xlsx", b"", r"a\.xlsx: the kinds of files are \.jsonl, \.json, \.csv"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(modules, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadParameter, match=message) as error:
        modules("_readers").read_file(tmp_path / name)
    assert "\n" not in error.value.message


def test_a_missing_file_is_answered_with_what_is_there(modules, tmp_path):
    write(tmp_path / "valid.csv", ROWS)
    for where in (tmp_path / "train.csv", tmp_path / "deeper" / "train.csv"):
        with pytest.raises(BadParameter, match=rf"there is no file {where}; {tmp_path} has valid\.csv"):
            modules("_data").read_set(str(where))
    with pytest.raises(BadParameter, match=rf"{tmp_path} has no file of the split 'train'; {tmp_path} has valid\.csv"):
        modules("_data").read_set(str(tmp_path))
    write(tmp_path / "train.jsonl", ROWS[:1])
    assert modules("_data").read_set(str(tmp_path)) == ROWS[:1]
    assert modules("_data").read_set(str(tmp_path), "valid") == ROWS


def test_columns_of_other_names_and_their_absence(modules, tmp_path):
    data = modules("_data")
    rows = [{"review": "good", "text": "not this", "stars": 5}]
    renamed = data.with_columns(rows, {"text": "review", "label": "stars"}, ["text"], name="rows.csv")
    assert (renamed[0]["text"], renamed[0]["label"]) == ("good", 5)
    message = r"rows\.csv, row 1: no 'comment'\. It has \['review', 'stars', 'text'\]; --text-column NAME says"
    # A column that was named and is missing is an error, though there is one of the field's own name.
    with pytest.raises(BadParameter, match=message):
        data.with_columns(rows, {"text": "comment"}, ["text"], name="rows.csv")
    with pytest.raises(BadParameter, match="row 1: no 'label'"):
        data.with_columns(rows, {}, ["text", "label"], name="rows.csv")


def test_lists_in_cells(modules):
    data = modules("_data")

    def read(cell):
        return data.with_columns([{"tokens": cell}], {}, ["tokens"], name="a", lists=["tokens"])[0]["tokens"]

    assert read('["a b", "c"]') == read("['a b', 'c']") == read(("a b", "c")) == ["a b", "c"]
    assert read("a b c") == ["a", "b", "c"]
    assert read("[1, 2]") == [1, 2]
    # As numpy and pandas write it: to Python that is the list ['ab'].
    with pytest.raises(BadParameter, match=r"row 1: \"\['a' 'b'\]\" is no list: give it as JSON"):
        read("['a' 'b']")


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one data set; `calls` are the requests."""
    features = {
        "tokens": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["bad", "good"]),
        "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"])),
    }
    rows = [{"tokens": "a b", "label": 1, "tags": [0, 1]}, {"tokens": "c", "label": -1, "tags": [0]}]
    calls = []

    def load_dataset(name, config=None, *, split):
        calls.append((name, config, split))
        if name != "me/set":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore lines")
        if split == "valid":
            raise ValueError("Unknown split \"valid\". Should be one of ['train', 'dev'].")
        return datasets.Dataset.from_list(rows, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_hub_gives_names_of_labels_and_splits_by_any_name(modules, hub):
    data = modules("_data")
    assert data.read_set("me/set:main") == [
        {"tokens": "a b", "label": "good", "tags": ["O", "B-PER"]},
        {"tokens": "c", "label": None, "tags": ["O"]},
    ]
    assert len(data.read_rows("me/set", "ace", "valid", columns={}, needed=["tokens"], lists=["tags"])) == 2
    assert hub == [("me/set", "main", "train"), ("me/set", "ace", "valid"), ("me/set", "ace", "dev")]
    with pytest.raises(BadParameter, match=r"'me/sett' is no file or folder here, .* doesn't exist on the Hub$"):
        data.read_set("me/sett")


def test_rows_of_a_language_in_a_folder_of_any_name(modules, tmp_path):
    data = modules("_data")
    how = {"columns": {}, "needed": ["text"]}
    write(tmp_path / "reviews" / "ace" / "dev.csv", ROWS)
    assert data.read_rows(str(tmp_path), "ace", "valid", **how) == ROWS
    write(tmp_path / "others" / "ace" / "dev.csv", ROWS[:1])
    with pytest.raises(BadParameter, match=r"several folders; name one: .*others/ace, .*reviews/ace"):
        data.read_rows(str(tmp_path), "ace", "valid", **how)
    assert data.read_rows(str(tmp_path / "others"), "ace", "valid", **how) == ROWS[:1]
    with pytest.raises(BadParameter, match=r"no rows of 'jav': none of .* exists; .* has others/, reviews/"):
        data.read_rows(str(tmp_path), "jav", "valid", **how)
    with pytest.raises(BadParameter, match=r"is a pattern without \{language\}"):
        data.read_rows(str(tmp_path / "{lang}.csv"), "jav", "valid", **how)


def test_raw_text_of_one_language_and_of_all(modules, tmp_path):
    data = modules("_data")
    write(tmp_path / "ace.csv", [{"sentence": "one"}])
    write(tmp_path / "ace_more.txt", [{"text": "two"}])
    write(tmp_path / "news_ban.txt", [{"text": "three"}])
    assert data.read_text(str(tmp_path), "ace", column="sentence") == ["one"]
    assert data.read_text(str(tmp_path), "ban", column="sentence") == ["three"]
    assert data.read_text(str(tmp_path / "{language}_more.txt"), "ace") == ["two"]
    with pytest.raises(BadParameter, match=r"row 1: no 'text'\. It has \['sentence'\]; --text-column NAME"):
        data.read_text(str(tmp_path), "ace")
    with pytest.raises(
        BadParameter, match=r"there is no file .*jav\.txt; .* has ace\.csv, ace_more\.txt, news_ban\.txt"
    ):
        data.read_text(str(tmp_path), "jav")

    assert data.read_texts(str(tmp_path), column="sentence") == {"ace": ["one", "two"], "news": ["three"]}
    assert data.read_texts(str(tmp_path / "news_{language}.txt")) == {"ban": ["three"]}
    table = write(tmp_path / "all.jsonl", [{"text": "x", "code": "ace"}, {"text": "y", "code": "ban"}])
    assert data.read_texts(str(table), language_column="code") == {"ace": ["x"], "ban": ["y"]}
    with pytest.raises(
        BadParameter, match=r"which column has the language\? \['code', 'text'\]; --language-column NAME"
    ):
        data.read_texts(str(table))


def test_instructions_have_questions_or_are_text(modules, tmp_path):
    read_pairs = modules("_instructions").read_pairs
    rows = [{"q": f"Q{i}", "a": f"A{i}", "input": "", "text": f"T{i}"} for i in range(20)]
    path = str(write(tmp_path / "rows.csv", rows))
    train, held_out = read_pairs(path, columns={"question": "q", "answer": "a"})
    assert (train[0], held_out) == (
        {"question": "Q0", "answer": "A0"},
        [{"question": f"Q{i}", "answer": f"A{i}"} for i in (18, 19)],
    )
    train, _ = read_pairs(path, columns={"text": "text"})
    assert train[0] == {"question": "", "answer": "T0"}
    plain = write(tmp_path / "plain.txt", [{"text": "one"}, {"text": "two"}])
    assert read_pairs(str(plain)) == ([{"question": "", "answer": "one"}], [{"question": "", "answer": "two"}])
    write(tmp_path / "folder" / "train.csv", rows)
    write(tmp_path / "folder" / "test.jsonl", [{"q": "Q", "a": "A"}])
    _, held_out = read_pairs(str(tmp_path / "folder"), columns={"question": "q", "answer": "a"})
    assert held_out == [{"question": "Q", "answer": "A"}]
    with pytest.raises(BadParameter, match=r"no 'ask'\. It has \['a', 'input', 'q', 'text'\]; --question-column NAME"):
        read_pairs(path, columns={"question": "ask"})
    with pytest.raises(BadParameter, match="goes without --question-column"):
        read_pairs(path, columns={"question": "q", "text": "text"})


def test_labels_of_the_target_that_the_source_lacks_are_refused(modules, tmp_path):
    write(tmp_path / "near" / "train.csv", [{"text": "a", "label": "1"}])
    write(tmp_path / "far" / "test.jsonl", [{"text": "b", "label": 1}])
    for code in ("near", "far"):
        write(tmp_path / f"{code}.txt", [{"text": "a"}])
    world = modules("_worlds").read_world(str(tmp_path), "near", "far")
    assert (world.labels, world.train, world.test) == (["1"], [("a", 0)], [("b", 0)])  # text in CSV, a number in JSON
    write(tmp_path / "far" / "test.jsonl", [{"text": "b", "label": 2}])
    with pytest.raises(BadParameter, match=r"'far' has the label '2', which 'near' has not: \['1'\]"):
        modules("_worlds").read_world(str(tmp_path), "near", "far")
    with pytest.raises(BadParameter, match="say where that is"):
        modules("_worlds").read_world("me/set", "near", "far")
