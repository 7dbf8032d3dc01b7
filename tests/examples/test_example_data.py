"""What the examples read: every kind of file and the Hub, with errors that name what is there."""

from __future__ import annotations

import importlib
import json
import re
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
        (
            "a.json",
            b'{"text": ["a", "b"], "label": ["x"]}',
            r"a\.json, which has columns of different lengths, \{'text': 2, 'label': 1\}: give a list of JSON objects",
        ),
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
        cells = {"tokens": data.as_list}
        return data.with_columns([{"tokens": cell}], {}, ["tokens"], name="a", cells=cells)[0]["tokens"]

    assert read('["a b", "c"]') == read("['a b', 'c']") == read(("a b", "c")) == ["a b", "c"]
    assert read("a b c") == ["a", "b", "c"]
    assert read("[1, 2]") == [1, 2]
    # As numpy and pandas write it: to Python that is the list ['ab'].
    for cell, got in (
        ("['a' 'b']", r"\"\['a' 'b'\]\""),
        (5, "5"),
        ({"a": 1}, r"\{'a': 1\}"),
        ([], r"\[\]"),
        ("", "''"),
    ):
        with pytest.raises(
            BadParameter, match=rf"a, row 1: 'tokens' must be a list with a word at least, .* got {got}; "
        ):
            read(cell)
    for cell in (["a", None], '["a", null]', ["a", ["b"]]):
        with pytest.raises(BadParameter, match=r"a, row 1: 'tokens\[1\]' must be text or a number, got (None|\['b'\])"):
            read(cell)


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
    assert (
        len(data.read_rows("me/set", "ace", "valid", columns={}, needed=["tokens"], cells={"tags": data.as_list})) == 2
    )
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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_words_in_a_list_are_text_and_other_values_are_none(modules, tmp_path, suffix):
    data = modules("_data")
    table = write(tmp_path / f"ace.{suffix}", [{"words": ["one", "two"], "code": "ace"}, {"words": [], "code": "ace"}])
    assert data.read_text(str(tmp_path), "ace", column="words") == ["one two"]
    assert data.read_texts(str(tmp_path), column="words") == {"ace": ["one two"]}
    assert data.read_texts(str(table), column="words", language_column="code") == {"ace": ["one two"]}
    for value in (3.5, True, [1, 2], {"en": "a"}):
        write(table, [{"words": value, "code": "ace"}])
        message = (
            rf"ace\.{suffix}, row 1: 'words' must be text or a list of words, got {re.escape(repr(value))}; --text-c"
        )
        for read in (
            lambda: data.read_text(str(tmp_path), "ace", column="words"),
            lambda: data.read_texts(str(tmp_path), column="words"),
            lambda: data.read_texts(str(table), column="words", language_column="code"),
        ):
            with pytest.raises(BadParameter, match=message):
                read()
    write(table, [{"words": "a", "code": ["ace"]}])
    with pytest.raises(
        BadParameter, match=r"row 1: 'code' must be text or a number, got \['ace'\]: .*; --language-column"
    ):
        data.read_texts(str(table), language_column="code", column="words")


def test_columns_in_json_are_rows(modules, tmp_path):
    read_file, path = modules("_readers").read_file, tmp_path / "a.json"
    columns = {"tokens": [["a", "b"], ["c"]], "label": [0, 1]}
    rows = [{"tokens": ["a", "b"], "label": 0}, {"tokens": ["c"], "label": 1}]
    for content in (columns, {"data": columns}, {"data": rows, "version": 1}):
        path.write_text(json.dumps(content))
        assert read_file(path) == rows
    path.write_text(json.dumps(rows[0]))  # with anything but lists it is a row
    assert read_file(path) == rows[:1]


def test_names_of_files_may_end_in_capitals(modules, tmp_path):
    data = modules("_data")
    rows = [{"text": "one", "label": "x"}]
    write(tmp_path / "ace" / "train.jsonl", rows).rename(tmp_path / "ace" / "train.JSONL")
    assert data.read_set(str(tmp_path / "ace")) == rows
    assert data.read_rows(str(tmp_path), "ace", "train", columns={}, needed=["text"]) == rows
    for name in ("ban.TXT", "news_jav.TXT"):
        (tmp_path / name).write_text("two\n")
        assert data.read_text(str(tmp_path), name[-7:-4]) == ["two"]


def test_a_block_of_comments_in_conllu_is_no_sentence(modules, tmp_path):
    pytest.importorskip("conllu", reason="the examples extra has conllu")
    word = "{}\t{}\t_\tX\t_\t_\t0\troot\t_\t_\n"
    empty_node = "0.1\tnothing" + "\t_" * 8 + "\n"
    blocks = ["# newdoc\n", "# sent_id = 1\n" + word.format(1, "a"), empty_node, word.format(1, "b"), "# the end\n"]
    (tmp_path / "a.conllu").write_text("\n".join(blocks) + "\n")
    assert [row["tokens"] for row in modules("_readers").read_file(tmp_path / "a.conllu")] == [["a"], ["b"]]


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


def test_a_column_is_the_question_the_answer_or_beside_the_question(modules, tmp_path):
    def first(row, **columns):
        return modules("_instructions").read_pairs(str(write(tmp_path / "rows.jsonl", [row] * 2)), columns=columns)[0][
            0
        ]

    row = {"input": "1+1?", "output": "2"}
    assert first(row, question="input") == {"question": "1+1?", "answer": "2"}
    assert first({"question": "q", "input": "a"}, answer="input") == {"question": "q", "answer": "a"}
    swapped = {"question": "a", "answer": "q", "input": "x"}
    assert first(swapped, question="answer", answer="question") == {"question": "q\nx", "answer": "a"}
    with pytest.raises(BadParameter, match=r"row 1: a row needs one of \['output', 'response'\] for the answer"):
        first(swapped, question="answer")
    with pytest.raises(BadParameter, match="question and answer cannot both be 'input': name two columns"):
        first(row, question="input", answer="input")
    dolly = {"instruction": "Say it shorter", "context": "A long text", "response": "short"}
    assert first(dolly) == {"question": "Say it shorter\nA long text", "answer": "short"}
    numbers = {"instruction": "double", "input": 0, "output": 0}
    assert first(numbers) == {"question": "double\n0", "answer": "0"}
    assert first({"question": "is it?", "answer": False}) == {"question": "is it?", "answer": "False"}
    assert first({"instruction": "do", "question": "", "input": None, "output": "x"}) == {
        "question": "do",
        "answer": "x",
    }
    two = {"instruction": "Answer", "question": "1+1?", "answer": "2"}
    with pytest.raises(BadParameter, match=r"both 'instruction' and 'question' may be the question: --question-column"):
        first(two)
    assert first(two, question="question") == {"question": "1+1?", "answer": "2"}
    with pytest.raises(
        BadParameter, match=r"both 'output' and 'response' may be the answer: --answer-column NAME says"
    ):
        first({"question": "q", "output": "a", "response": "b"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "b", "output": ""}, "the answer is empty, 'output' is '': fill it in, or leave the row out"),
        ({"instruction": "b", "output": None}, "the answer is empty, 'output' is None"),
        ({"instruction": " ", "output": "x"}, "the question is empty, 'instruction' is ' '"),
        ({"instruction": "b", "output": ["x", "y"]}, r"'output' must be text or a number, got \['x', 'y'\]: write it"),
        ({"instruction": "b", "output": []}, r"'output' must be text or a number, got \[\]"),
        ({"instruction": {"en": "b"}, "output": "x"}, r"'instruction' must be text or a number, got \{'en': 'b'\}"),
        ({"instruction": "b", "input": ["c"], "output": "x"}, r"'input' must be text or a number, got \['c'\]"),
        ({"instruction": "b", "output": float("nan")}, "'output' must be text or a number, got nan"),
    ],
)
def test_a_row_that_is_no_question_and_answer_is_named(modules, tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "a", "input": "", "output": "x"}, row])
    with pytest.raises(BadParameter, match=rf"rows\.jsonl, row 2: {message}"):
        modules("_instructions").read_pairs(str(path))
    renamed = write(tmp_path / "other.jsonl", [{"q": "a", "a": "x"}, {"q": "b", "a": ""}])
    with pytest.raises(BadParameter, match=r"other\.jsonl, row 2: the answer is empty, 'a' is ''"):
        modules("_instructions").read_pairs(str(renamed), columns={"question": "q", "answer": "a"})


def test_text_to_be_learnt_is_text_and_not_blank(modules, tmp_path):
    def read(*texts):
        path = write(tmp_path / "rows.jsonl", [{"body": text} for text in texts])
        return [
            pair["answer"]
            for part in modules("_instructions").read_pairs(str(path), columns={"text": "body"})
            for pair in part
        ]

    assert read("one", " ", ["two", "words"]) == ["one", "two words"]
    with pytest.raises(
        BadParameter, match=r"row 2: 'body' must be text or a list of words, got \{'en': 'b'\}; --text-col"
    ):
        read("one", {"en": "b"})
    with pytest.raises(BadParameter, match=r"rows\.jsonl has no text in 'body', in none of 2 rows"):
        read("", " ")


def write_world(folder, train, test):
    write(folder / "near" / "train.jsonl", train)
    write(folder / "far" / "test.jsonl", test)
    for code in ("near", "far"):
        write(folder / f"{code}.txt", [{"text": "a"}])


def test_a_world_is_not_tested_on_what_it_learns_from(modules, tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    write_world(tmp_path, rows, rows)
    read_world = modules("_worlds").read_world
    assert len(read_world(str(tmp_path), "near", "far").test) == 2
    text, one = str(tmp_path / "{language}.txt"), write(tmp_path / "rows.jsonl", rows)
    message = "would be both trained and tested on: a pattern with {split} tells the two apart"
    with pytest.raises(BadParameter, match=message):
        read_world(str(one), "near", "far", text=text)
    # Under another name it is the same file.
    (tmp_path / "far" / "test.jsonl").unlink()
    (tmp_path / "far" / "test.jsonl").symlink_to(tmp_path / "near" / "train.jsonl")
    with pytest.raises(BadParameter, match=message):
        read_world(str(tmp_path), "near", "far")


def test_a_world_of_one_label_or_without_texts_is_refused(modules, tmp_path):
    rows = [{"text": ["a", "b"], "label": 1}, {"text": "c", "label": 2}]
    write_world(tmp_path, rows, rows)
    read_world = modules("_worlds").read_world
    assert read_world(str(tmp_path), "near", "far").train == [("a b", 0), ("c", 1)]
    write_world(tmp_path, rows[:1], rows[:1])
    with pytest.raises(BadParameter, match="all training rows have the label '1': there is nothing to learn"):
        read_world(str(tmp_path), "near", "far")
    for row, message in (
        (
            {"text": {"en": "a"}, "label": 1},
            r"'text' must be text or a list of words, got \{'en': 'a'\}; --text-column",
        ),
        ({"text": "a", "label": [1]}, r"'label' must be text or a number, got \[1\]: write it as text; --label-column"),
    ):
        write_world(tmp_path, [rows[1], row], rows)
        with pytest.raises(BadParameter, match=rf"train\.jsonl, row 2: {message} NAME"):
            read_world(str(tmp_path), "near", "far")


def test_labels_of_the_target_that_the_source_lacks_are_refused(modules, tmp_path):
    write(tmp_path / "near" / "train.csv", [{"text": "a", "label": "1"}, {"text": "c", "label": "3"}])
    write(tmp_path / "far" / "test.jsonl", [{"text": "b", "label": 3}])
    for code in ("near", "far"):
        write(tmp_path / f"{code}.txt", [{"text": "a"}])
    world = modules("_worlds").read_world(str(tmp_path), "near", "far")
    assert world.labels == ["1", "3"]
    assert (world.train, world.test) == ([("a", 0), ("c", 1)], [("b", 1)])  # text in CSV, a number in JSON
    write(tmp_path / "far" / "test.jsonl", [{"text": "b", "label": 2}])
    with pytest.raises(BadParameter, match=r"'far' has the label '2', which 'near' has not: \['1', '3'\]"):
        modules("_worlds").read_world(str(tmp_path), "near", "far")
    with pytest.raises(BadParameter, match="say where that is"):
        modules("_worlds").read_world("me/set", "near", "far")
