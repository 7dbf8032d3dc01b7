"""`examples/cross_lingual`: every task and method on the invented world, data of all kinds, and the errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer import BadParameter

from tests.support import examples
from tests.support.examples import EXAMPLES

pytest.importorskip("seqeval", reason="the examples extra has seqeval")
pytest.importorskip("sklearn", reason="the examples extra has scikit-learn")
pytest.importorskip("conllu", reason="the examples extra has conllu")
FOLDERS = (EXAMPLES, EXAMPLES / "cross_lingual")


@pytest.fixture
def modules():
    """Import a module of the examples by name."""
    with examples.importing(*FOLDERS) as module:
        yield module


@pytest.fixture
def run(modules, tmp_path):
    """Run the command line in this process; returns (exit code, output with single spaces)."""

    def run_example(*arguments: object, name: str = "run") -> tuple[int, str]:
        code, output = examples.run(modules(name), tmp_path / "out", *arguments)
        return code, re.sub(r"[│╭╮╰╯─\s]+", " ", output)

    return run_example


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The invented world's encoder, hardly pretrained."""
    with examples.importing(*FOLDERS) as module:
        invented = module("_invented")
        return invented.tiny_bert(tmp_path_factory.mktemp("encoder"), invented.World(0), steps=20)


@pytest.fixture
def quick(run, modules, monkeypatch, encoder):
    """The command on the invented world, with the encoder that is there and a few steps."""

    def quick_run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(modules("run"), "tiny_bert", lambda *args, **kwargs: encoder)
        return run("--language-steps", 2, "--rows", 30, "--resamples", 20, *arguments)

    return quick_run


# The least that a few steps reach; nothing is expected of the harder ones.
TASKS = {"pos": 0.5, "ner": 0.0, "dp": 0.3, "nli": 0.0, "sentiment": 0.0, "qa": 0.0}


def quickest(names, default):
    """All of them in the slow tests, one in the default ones: ten seconds each."""
    return [name if name == default else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("task", quickest(TASKS, "ner"))
def test_every_task_runs_on_the_invented_world(quick, tmp_path, task):
    code, output = quick("--task", task, "--steps", 25 if task in ("pos", "dp") else 8)
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = found["scores"]["far"]
    assert list(scores) == ["task alone", "near + task", "target + task"]
    assert all(TASKS[task] <= score <= 1 for score in scores.values())
    assert len(found["answers"]["far"]["task alone"]) == 30
    for way, score in scores.items():
        assert f"{100 * score:.1f}" in output, way
    d = found["differences"]["far"]
    assert d["low"] <= d["mean"] <= d["high"]
    assert d["mean"] == pytest.approx(100 * (scores["target + task"] - scores["task alone"]))
    assert (tmp_path / "out" / "scores.png").stat().st_size > 0
    language = json.loads((tmp_path / "out" / "language-far" / "adapter_config.json").read_text())
    own = json.loads((tmp_path / "out" / "task" / "adapter_config.json").read_text())
    assert (language["l1"], own["l1"]) == (0.1, 0.0)
    for config in (language, own):
        assert config["target_norms"] is False
        assert not any("LayerNorm" in name for name in config["counts"])


@pytest.mark.parametrize(
    "method", quickest(["deft_x", "rand", "fisher", "spiel_ag", "bitfit", "mad_x", "lora"], "mad_x")
)
def test_every_method_runs(quick, tmp_path, method):
    code, output = quick("--task", "sentiment", "--method", method, "--steps", 3)
    assert code == 0, output
    configs = [
        json.loads((tmp_path / "out" / name / "adapter_config.json").read_text()) for name in ("language-far", "task")
    ]
    kinds = {"lora": "LORA", "mad_x": "BOTTLENECK"}
    assert {config["peft_type"] for config in configs} == {kinds.get(method, "SPARSE_FT")}
    if method == "bitfit":
        for config in configs:
            assert all(name.startswith("bert.") and name.endswith(".bias") for name in config["counts"])
    if method == "mad_x":
        assert [config["leave_out"] for config in configs] == [[-1], [-1]]


def test_the_task_is_trained_with_the_sources_language_active(quick, modules, monkeypatch):
    seen = []
    trainer_class = modules("_training").SparseTrainer
    compute_loss = trainer_class.compute_loss

    def watching(trainer, model, *args, **kwargs):
        trained = sorted(n for n, p in model.named_parameters() if p.requires_grad)
        seen.append((list(model.active_adapters), trained))
        return compute_loss(trainer, model, *args, **kwargs)

    monkeypatch.setattr(trainer_class, "compute_loss", watching)
    assert quick("--task", "sentiment", "--steps", 2)[0] == 0
    of_task = [(active, trained) for active, trained in seen if "task" in active]
    assert len(of_task) == 4  # two phases of two steps
    assert all(active == ["near", "task"] for active, _ in of_task)
    assert not any(".near" in name for _, trained in of_task for name in trained)


def write_world(modules, folder: Path, task: str, suffix: str = "jsonl") -> None:
    world = modules("_invented").World(0)
    for language in ("near", "far"):
        (folder / language).mkdir(parents=True)
        for split, seed in (("train", 1), ("test", 2)):
            rows = world.rows(task, language, 12, seed=seed)
            path = folder / language / f"{split}.{suffix}"
            if suffix == "jsonl":
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            elif suffix == "conllu":
                path.write_text("".join(conllu_of(row) for row in rows), encoding="utf-8")
            else:
                from datasets import Dataset

                data = Dataset.from_list(rows)
                data.to_csv(path) if suffix == "csv" else data.to_parquet(path)
        (folder / f"{language}.txt").write_text("\n".join(world.text(language, 30, seed=3)), encoding="utf-8")


def conllu_of(row: dict) -> str:
    """With a multiword token and an empty node, which are no words."""
    lines = ["# text = of one sentence", "1-2\tmerged" + "\t_" * 8]
    for number, (word, head, relation) in enumerate(
        zip(row["tokens"], row["heads"], row["relations"], strict=True), start=1
    ):
        lines.append(f"{number}\t{word}\t_\tNOUN\t_\t_\t{head}\t{relation}:sub\t_\t_")
    lines.append("3.1\tempty" + "\t_" * 8)
    return "\n".join(lines) + "\n\n"


REAL = ["--source", "near", "--target", "far", "--steps", 2, "--language-steps", 2, "--resamples", 10]


@pytest.mark.parametrize(
    ("task", "suffix"),
    [
        pytest.param(*case, marks=[] if case[0] == "dp" else pytest.mark.slow)
        for case in (("nli", "csv"), ("pos", "parquet"), ("dp", "conllu"), ("qa", "jsonl"))
    ],
)
def test_data_of_all_kinds(run, modules, encoder, tmp_path, task, suffix):
    write_world(modules, tmp_path / "data", task, suffix)
    code, output = run(
        "--task", task, "--data", tmp_path / "data", "--model", encoder, "--text", tmp_path / "data", *REAL
    )
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["answers"]["far"]["target + task"]) == 12
    if task == "dp":
        gold = modules("_invented").World(0).rows("dp", "far", 12, seed=2)
        read = modules("_readers").read_file(tmp_path / "data" / "far" / "test.conllu")
        assert [row["heads"] for row in read] == [row["heads"] for row in gold]
        assert [row["tokens"] for row in read] == [row["tokens"] for row in gold]


def test_several_sources_and_columns_of_other_names(run, modules, encoder, tmp_path):
    write_world(modules, tmp_path / "data", "sentiment")
    for path in (tmp_path / "data").rglob("*.jsonl"):
        path.write_text(path.read_text().replace('"text"', '"review"'), encoding="utf-8")
    pattern = str(tmp_path / "data" / "{language}" / "{split}.jsonl")
    options = ["--data", pattern, "--model", encoder, "--text", tmp_path / "data" / "{language}.txt"]
    code, output = run("--task", "sentiment", *options, *REAL, "--source", "far", "--column", "text=review")
    assert code == 0, output
    code, output = run("--task", "sentiment", *options, *REAL)
    assert code == 2
    message = "train.jsonl, row 1: no 'text'. It has ['label', 'review']; --column text=NAME"
    # Typer breaks lines anywhere.
    assert message.replace(" ", "") in output.replace(" ", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "near"], "are for real data: give --data"),
        (["--data", "somewhere"], "--data needs an encoder (--model), --source and --target"),
        (["--data", "./nowhere", "--model", "m", *REAL, "--no-language"], "./nowhere is no folder, and no pattern"),
        (["--data", "x/{language}/{split}.csv", "--model", "m", *REAL, "--no-language"], "no rows of 'near': none of"),
        (["--data", "x/{language}.csv", "--model", "m", *REAL], "language adapters need raw text: --text"),
        (["--column", "text"], "--column takes FIELD=NAME, got 'text'"),
        (["--method", "ltsft"], "'ltsft' is not one of"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, options, message):
    code, output = run("--task", "sentiment", *options)
    assert code == 2
    assert message in output


def test_files_that_cannot_be_read_are_refused(modules, tmp_path):
    data = modules("_data")
    path = tmp_path / "far" / "test.jsonl"
    path.parent.mkdir()
    for content, message in [
        ('{"a": 1}\n{"a"\n', "line 2: no JSON"),
        ("[1]\n", "line 1: no JSON object"),
        ("", "no rows"),
    ]:
        path.write_text(content)
        with pytest.raises(BadParameter, match=message):
            data.read_rows(str(tmp_path), "far", "test", columns={}, needed=[])
    with pytest.raises(BadParameter, match=r"no raw text of 'far': there is no file .*far\.txt"):
        data.read_text(str(tmp_path), "far")
    with pytest.raises(BadParameter, match="the label 'Z' is none of the source's"):
        modules("_tasks").ids_of(["A"], {}, ["A", "Z"])


def test_labels_are_names_and_some_of_them_are_in_training(modules, capsys):
    tasks = modules("_tasks")
    pos, dp, sentiment = (tasks.TASKS[name] for name in ("pos", "dp", "sentiment"))
    numbers, texts = ({"tokens": ["a", "b"], "upos": tags} for tags in ([3, 1], ["3", "1 "]))
    assert pos.clean(numbers)["upos"] == pos.clean(texts)["upos"] == ["3", "1"]
    assert sentiment.clean({"text": "good ", "label": " positive"}) == {"text": "good ", "label": "positive"}
    with pytest.raises(BadParameter, match=r"heads must be numbers .* got \[None\]"):
        dp.clean({"heads": [None], "relations": ["root"]})
    rows = [{"text": "a", "label": label} for label in ("bad", "good")]
    assert tasks.labels_of(sentiment, rows, {"far": rows[:1]}) == ["bad", "good"]
    assert not capsys.readouterr().err
    assert tasks.labels_of(sentiment, rows, {"far": [*rows, {"text": "b", "label": "fair"}]}) == ["bad", "good"]
    assert "Training has no label ['fair'], which 'far' is tested on: never predicted." in capsys.readouterr().err
    with pytest.raises(BadParameter, match=r"'far' is tested on the labels \['Good'\], and training has none"):
        tasks.labels_of(sentiment, rows, {"far": [{"text": "a", "label": "Good"}]})
    with pytest.raises(BadParameter, match="all training rows have the label 'bad': there is nothing to learn"):
        tasks.labels_of(sentiment, rows[:1], {"far": rows})
    tree = {"tokens": ["a"], "heads": [0], "relations": ["root"]}
    assert tasks.labels_of(dp, [tree], {"far": [tree]}) == ["root"]
    assert tasks.labels_of(tasks.TASKS["qa"], [], {"far": []}) is None


def test_what_is_trained_on_is_not_tested_on(run, tmp_path):
    (tmp_path / "near.jsonl").write_text('{"text": "a", "label": "x"}\n')
    pattern = str(tmp_path / "{language}.jsonl")
    options = ["--data", pattern, "--model", "m", "--no-language", "--source", "near", "--target", "near"]
    code, output = run("--task", "sentiment", *options)
    assert code == 2
    assert "bothtrainedandtestedon" in output.replace(" ", "")
    # One file for each is one file for both, though the languages differ.
    both = ["--data", tmp_path / "near.jsonl", "--test-data", tmp_path / "near.jsonl", *options[2:-1], "far"]
    code, output = run("--task", "sentiment", *both)
    assert code == 2
    assert "bothtrainedandtestedon" in output.replace(" ", "")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "dp",
            {"tokens": [], "heads": [], "relations": []},
            r"'tokens' must be a list with a word at least, .* got \[\]",
        ),
        (
            "dp",
            {"tokens": ["a"], "heads": [None], "relations": ["x"]},
            r"'heads\[0\]' must be text or a number, got None",
        ),
        ("ner", {"tokens": ["a"], "tags": [["O"]]}, r"'tags\[0\]' must be text or a number, got \['O'\]"),
        ("nli", {"premise": "a", "hypothesis": 3, "label": 1}, "'hypothesis' must be text or a list of words, got 3"),
        ("sentiment", {"text": "a", "label": ["x"]}, r"'label' must be text or a number, got \['x'\]"),
        ("qa", {"question": "a", "context": {}, "answer": "a"}, r"'context' must be text or a list of words, got \{\}"),
    ],
)
def test_a_cell_that_is_no_text_or_list_is_named(modules, tmp_path, task, row, message):
    example, tasks = modules("run"), modules("_tasks").TASKS
    for code, split in (("near", "train"), ("far", "test")):
        (tmp_path / code).mkdir()
        (tmp_path / code / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadParameter, match=rf"train\.jsonl, row 1: {message}.*; --column .*=NAME names another column"):
        example.read_tables(tasks[task], str(tmp_path), "", ["near"], ["far"], {})


def test_words_in_a_list_are_a_text_of_a_task(modules, tmp_path):
    example, tasks = modules("run"), modules("_tasks").TASKS
    for code, split in (("near", "train"), ("far", "test")):
        (tmp_path / code).mkdir()
        (tmp_path / code / f"{split}.jsonl").write_text(json.dumps({"words": ["a", "b"], "label": 1}) + "\n")
    train, tests = example.read_tables(tasks["sentiment"], str(tmp_path), "", ["near"], ["far"], {"text": "words"})
    assert train["near"][0]["text"] == tests["far"][0]["text"] == "a b"


def test_squads_scores_are_the_official_ones(modules):
    squad = modules("_squad")
    # Of the official script: articles, case and punctuation do not count, words do.
    assert squad.exact_match("The Eiffel Tower!", "eiffel tower") == 1
    assert squad.f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert squad.f1("", "") == 1
    assert squad.f1("dog", "") == squad.f1("dog", "cat") == 0


def test_answers_in_long_contexts_are_found_in_their_window(modules, encoder):
    from transformers import AutoTokenizer

    squad, invented = modules("_squad"), modules("_invented")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    row = invented.World(0).rows("qa", "near", 1, seed=0)[0]
    filler = invented.World(0).text("near", 6, seed=9)
    context = " ".join([*filler, row["context"]])
    long = {**row, "context": context, "answer_start": row["answer_start"] + len(context) - len(row["context"])}
    cut = squad.windows(tokenizer, [long], 16, with_answers=True)
    assert len(cut) > 3
    spans = [(w["start_positions"], w["end_positions"]) for w in cut]
    found = [tokenizer.decode(w["input_ids"][s : e + 1]) for w, (s, e) in zip(cut, spans, strict=True) if s]
    assert found
    assert set(found) == {row["answer"]}
    window = squad.windows(tokenizer, [long], 16, with_answers=False)[-1]
    place = next(i for i, o in enumerate(window["offsets"]) if o and context[o[0] : o[1]] == row["answer"])
    starts = [10.0 if i == place else 0.0 for i in range(len(window["offsets"]))]
    _, first, last = squad.best_span(starts, starts, window["offsets"])
    assert context[first:last] == row["answer"]


def test_a_bootstrap_sees_a_difference_and_none(modules):
    report = modules("_report")
    rows, right = list(range(200)), list(range(200))
    wrong = [i if i % 4 else -1 for i in rows]

    def score(chosen, answers):
        return sum(a == b for a, b in zip(chosen, answers, strict=True)) / len(chosen)

    found = report.paired_bootstrap(rows, right, wrong, score, resamples=500)
    assert found.mean == pytest.approx(25)
    # The standard error of a share of 1/4 in 200 rows is 3.06 points.
    assert found.high - found.low == pytest.approx(2 * 1.96 * 3.06, rel=0.2)
    none = report.paired_bootstrap(rows, wrong, wrong, score, resamples=50)
    assert (none.mean, none.low, none.high) == (0, 0, 0)


def test_a_word_is_labelled_at_its_first_subword_and_cut_words_are_neutral(modules, encoder):
    from transformers import AutoTokenizer

    tasks, tokenizer = modules("_tasks"), AutoTokenizer.from_pretrained(encoder)
    row = modules("_invented").World(0).rows("ner", "near", 1, seed=0)[0]
    labels = ["B-LOC", "B-PER", "O"]
    (feature,) = tasks.TASKS["ner"].encode(tokenizer, [row], labels, 32)
    assert [labels[i] for i in feature["labels"] if i != -100] == row["tags"]
    model = tasks.token_model(str(encoder), labels)
    (answers,) = tasks.TASKS["ner"].predict(model, tokenizer, [row], labels, 4)
    assert len(answers) == len(row["tags"])
    assert set(answers[2:]) == {"O"}
    assert tasks.TASKS["ner"].clean({"tags": ["B-DATE", "I-MISC", "B-PER"]})["tags"] == ["O", "O", "B-PER"]


def test_the_arms_of_mixed_data_are_the_chapters(modules):
    mixed = modules("mixed_data")
    mixture, world = mixed.invented(0)
    arms = mixed.arms(mixture, [20, 50], seed=0)
    assert list(arms) == [
        "zero-shot", "few-shot 20", "few-shot 20 x10", "few-shot 50", "few-shot 50 x10", "lexicon", "gold",
    ]  # fmt: skip
    assert {name: sum(one.language == "far" for one in own.values()) for name, own in arms.items()} == {
        name: int(name != "zero-shot") for name in arms
    }
    plain, tenfold = arms["few-shot 20"]["far gold"], arms["few-shot 20 x10"]["far gold"]
    assert (plain.upsampling, tenfold.upsampling, plain.examples) == (1, 10, tenfold.examples)
    assert len(plain.examples) == 20
    translated = arms["lexicon"]["far lexicon"].examples
    near, far = world.words["near"], world.words["far"]
    meaning = {form: name for name, form in near.items()}
    for row, other in zip(mixture.labelled, translated, strict=True):
        assert row["label"] == other["label"]
        for word, new in zip(row["text"].split(), other["text"].split(), strict=True):
            assert new in (word, far[meaning[word]])
            assert (new == far[meaning[word]]) == (word in mixture.lexicon or far[meaning[word]] == word)


@pytest.mark.slow
def test_mixed_data_runs_on_the_invented_world(run, modules, monkeypatch, encoder, tmp_path):
    monkeypatch.setattr(modules("mixed_data"), "tiny_bert", lambda *args, **kwargs: encoder)
    options = ["--steps", 3, "--language-steps", 2, "--rows", 30, "--shots", 10, "--resamples", 10]
    arms = ["zero-shot", "few-shot 10 x10", "lexicon"]
    code, output = run(*options, *[part for arm in arms for part in ("--arm", arm)], name="mixed_data")
    assert code == 0, output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["scores"]) == arms
    assert all(len(answers) == 30 for answers in found["answers"].values())
    assert found["differences"]["zero-shot"]["mean"] == 0
    assert "above zero-shot [95 %]" in output
    assert (tmp_path / "out" / "few-shot-10-x10" / "task" / "adapter_config.json").is_file()


def test_mixed_data_reads_translations_and_a_lexicon(run, modules, tmp_path):
    mixed = modules("mixed_data")
    for language, ids in (("ind", [3, 1, 2]), ("ace", [1, 2, 3])):
        folder = tmp_path / "rows" / language
        folder.mkdir(parents=True)
        rows = [{"id": i, "text": f"{language} {i}", "label": "positive"} for i in ids]
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "ind.txt").write_text("satu\n")
    (tmp_path / "text" / "nusax_train_ace.txt").write_text("sa\n")
    lexicon = tmp_path / "words.csv"
    with pytest.raises(BadParameter, match=r"there is no file .*words\.csv; .* has rows/, text/"):
        mixed.real(str(tmp_path), "ind", "ace", file=str(lexicon))
    lexicon.write_text("ind,x\nInd,aceh\n")
    with pytest.raises(BadParameter, match=r"row 1: no 'ace'\. It has \['ind', 'x'\]; --lexicon-columns SOURCE TARGET"):
        mixed.real(str(tmp_path), "ind", "ace", file=str(lexicon))
    lexicon.write_text("ind,x\nInd,aceh\nace,\n")  # a word without a translation stays
    found = mixed.real(str(tmp_path), "ind", "ace", file=str(lexicon), words=("ind", "x"))
    assert found.lexicon == {"ind": "aceh"}
    pairs = tmp_path / "words.jsonl"
    pairs.write_text('{"ind": "satu", "ace": ["sa", "saboh"]}\n')
    message = r"row 1: 'ace' must be text or a number, got \['sa', 'saboh'\].*; --lexicon-columns SOURCE TARGET"
    with pytest.raises(BadParameter, match=message):
        mixed.read_lexicon("ind", "ace", file=str(pairs))
    assert [row["id"] for row in found.gold] == [row["id"] for row in found.labelled] == [3, 1, 2]
    assert [row["text"] for row in mixed.word_by_word(found.labelled, found.lexicon)] == ["aceh 3", "aceh 1", "aceh 2"]
    assert found.text == {"ind": ["satu"], "ace": ["sa"]}
    # Without a lexicon that arm is missing, and the others are there.
    plain = mixed.real(str(tmp_path / "rows"), "ind", "ace", text=str(tmp_path / "text"))
    assert list(mixed.arms(plain, [1], seed=0)) == ["zero-shot", "few-shot 1", "few-shot 1 x10", "gold"]
    with pytest.raises(BadParameter, match="would be both trained and tested on"):
        mixed.real(str(tmp_path / "rows" / "{language}" / "train.jsonl"), "ind", "ace", text=str(tmp_path / "text"))
    gold = tmp_path / "rows" / "ace" / "train.jsonl"
    gold.write_text(gold.read_text().replace('"id": 2', '"id": 1'))
    with pytest.raises(BadParameter, match="'ace' has 1 ids of several rows, '1' for one"):
        mixed.real(str(tmp_path / "rows"), "ind", "ace", text=str(tmp_path / "text"))
    code, output = run("--data", tmp_path, name="mixed_data")
    assert code == 2
    assert "give an encoder" in output
