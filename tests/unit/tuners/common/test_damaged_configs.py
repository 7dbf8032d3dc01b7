"""A config that cannot be read is told with its file, the field and the way out; one of a newer version is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, get_peft_model

from peft_sparse import ConfigError, FormatError, extract_adapter, import_adapter, inspect_adapter, merge_checkpoint
from tests.support.adapters import TYPES, adapted
from tests.support.foreign_files import write_peft
from tests.support.models import llama, picture

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module", params=TYPES)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(kind, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    adapted(kind, llama()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **fields) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, **fields}))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00\x01", b"[" * 100_000])
def test_what_is_no_json(kind, folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{CONFIG} of '{folder}' is not valid JSON.*Download the adapter again"):
        PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(folder)


@pytest.mark.parametrize("content", [b"[1]", b"3", b"null"])
def test_what_is_no_object(kind, folder, content):
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{CONFIG} of '{folder}' is damaged"):
        PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"modules_to_save": 5}, ConfigError, ": modules_to_save must be a list of names, got 5"),
        ({"init_weights": "no"}, ConfigError, ": init_weights must be True or False, got 'no'"),
        ({"trainable_token_indices": {"x": -1}}, ConfigError, ": trainable_token_indices must be a list of"),
        ({"task_type": "NOPE"}, FormatError, " is damaged .Invalid task type: 'NOPE'"),
        (
            {"peft_type": "NEWER"},
            FormatError,
            ": peft_type 'NEWER' is of no adapter that .* knows.*pip install -U peft",
        ),
        ({"peft_type": []}, FormatError, " is damaged"),
    ],
)
def test_a_field_that_cannot_be(kind, folder, fields, error, said):
    change(folder, **fields)
    with pytest.raises(error, match=rf"^{CONFIG} of '{folder}'{said}"):
        PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(folder)


@pytest.mark.parametrize("language", [["quy", "eng"], {"quy": 1}, 5])
def test_a_language_to_start_with_is_one(tmp_path, language):
    adapted("MAD_G", llama()).save_pretrained(tmp_path)
    change(tmp_path, language=language)
    base = llama()
    before = picture(base)
    with pytest.raises(ConfigError, match="language must be the code of a language to start with"):
        PeftModel.from_pretrained(base, tmp_path)
    assert picture(base) == before


def test_a_model_that_is_given_it_stays_as_it_was(kind, folder):
    change(folder, modules_to_save=5)
    base, model = llama(), adapted(kind, llama(), "a")
    before = picture(base), picture(model)
    with pytest.raises(ConfigError, match=f"{CONFIG} of '{folder}': modules_to_save"):
        PeftModel.from_pretrained(base, folder)
    with pytest.raises(ConfigError, match=f"{CONFIG} of '{folder}': modules_to_save"):
        model.load_adapter(folder, "b")
    assert (picture(base), picture(model)) == before


def test_fields_of_a_newer_version_are_told_and_left_out(kind, folder):
    expected = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(folder).to_dict()
    change(folder, of_tomorrow=1)
    with pytest.warns(UserWarning, match="of_tomorrow"):
        found = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(folder)
    assert found.to_dict() == expected


def test_readers_without_a_model_name_the_file(folder, tmp_path):
    llama().save_pretrained(base := tmp_path / "base")
    (folder / CONFIG).write_text("{")
    readers = (
        lambda: inspect_adapter(folder),
        lambda: merge_checkpoint(base, folder, tmp_path / "out"),
        lambda: extract_adapter(base, folder, tmp_path / "out", density=0.1),
        lambda: import_adapter(folder, tmp_path / "out"),
    )
    for read in readers:
        with pytest.raises(FormatError, match=f"{folder}/{CONFIG} is not valid JSON"):
            read()
        assert not (tmp_path / "out").exists()


FIELDS = [
    ("peft_type", [5]),
    ("base_model_name_or_path", 5),
    ("revision", {"main": 1}),
    ("modules_to_save", 5),
    ("modules_to_save", [5]),
    ("auto_mapping", [1]),
]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A LoRA adapter, one of the SpIEL fork and one of ours, beside their base."""
    folder = tmp_path_factory.mktemp("foreign")
    llama().save_pretrained(folder / "base")
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    adapted("SPARSE_FT", llama()).save_pretrained(folder / "ours")
    name = "model.layers.0.self_attn.q_proj.sft_delta"
    tensors = {f"{name}.values": torch.ones(3), f"{name}.indices": torch.arange(3, dtype=torch.int32)}
    settings = {"peft_type": "SFT", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / "base")}
    write_peft(folder / "sft", settings, tensors)
    return folder


@pytest.mark.parametrize(("field", "value"), [*FIELDS, ("selection_algorithm", [5])])
def test_fields_that_readers_without_a_model_cannot_read_are_named(foreign, tmp_path, field, value):
    out = tmp_path / "out"
    verbs = {
        "lora": lambda folder: extract_adapter(foreign / "base", folder, out, density=0.1),
        "sft": lambda folder: import_adapter(folder, out),
        "ours": lambda folder: merge_checkpoint(foreign / "base", folder, out),
    }
    for name in ("sft",) if field == "selection_algorithm" else verbs:
        shutil.copytree(foreign / name, tmp_path / name)
        change(tmp_path / name, **{field: value})
        with pytest.raises(FormatError, match=field) as error:
            verbs[name](tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert not out.exists()


def test_what_peft_needs_another_package_for_is_no_difference(foreign, tmp_path):
    shutil.copytree(foreign / "lora", tmp_path / "lora")
    change(tmp_path / "lora", megatron_config={"a": 1})
    with pytest.raises(FormatError, match="has megatron_config="):
        extract_adapter(foreign / "base", tmp_path / "lora", tmp_path / "out", density=0.1)


def test_rows_of_tokens_that_the_file_lacks_are_named(kind, folder):
    change(folder, trainable_token_indices=[5])
    base, model = llama(), adapted(kind, llama(), "a")
    before = picture(base), picture(model)
    for load in (lambda: PeftModel.from_pretrained(base, folder), lambda: model.load_adapter(folder, "b")):
        with pytest.raises(
            FormatError, match=r"no 'model.embed_tokens.token_adapter.trainable_tokens_delta', the rows"
        ):
            load()
    assert (picture(base), picture(model)) == before
