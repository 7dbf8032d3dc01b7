"""`save_pretrained` over an adapter that is there: the new one is there as a whole, or the old one still is."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_sparse import ConfigError, files
from tests.support.adapters import TYPES, adapted
from tests.support.models import llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "adapter_model.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(model: nn.Module) -> nn.Module:
    """The same model after its adapters have trained."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ("default" in name or ".a." in name):
            parameter.data *= 3
    return model


def saved(kind: str, folder: Path, *names: str) -> PeftModel:
    """A model whose adapters lie in a folder, with what others wrote beside them."""
    model = adapted(kind, llama(), *names)
    model.save_pretrained(folder)
    for place in [folder, *(folder / name for name in names if name != "default")]:
        (place / "notes.txt").write_text("mine")
        with (place / "README.md").open("a") as card:
            card.write("\nMy own words.\n")
    return model


@pytest.mark.parametrize("kind", TYPES)
def test_a_full_disk_leaves_all_of_the_old(tmp_path, kind):
    model = changed(saved(kind, tmp_path / "out"))
    before = content(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(OSError, match=r"nothing was written or changed: '.*out'"):
            model.save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert content(tmp_path) == before


@pytest.mark.parametrize("number", range(1, 13))
def test_what_fails_between_two_moves_mixes_nothing(tmp_path, monkeypatch, number):
    """Two adapters of three files each, which are moved away and back."""
    model = changed(saved("SPARSE_FT", tmp_path / "out", "default", "a"))
    before, replace, calls = content(tmp_path), os.replace, []

    def failing(source, target):
        # What cards and the like are written with is in the staging folder itself.
        if ".staging" not in Path(target).parent.name or ".old" in str(target):
            calls.append(source)
            if len(calls) == number:
                raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(PermissionError):
        model.save_pretrained(tmp_path / "out")
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", TYPES)
def test_the_new_is_there_with_what_others_wrote(tmp_path, kind):
    out = tmp_path / "a"
    model = changed(saved(kind, out, "default", "a"))  # the adapter is called like the folder
    model.save_pretrained(out)
    for name, folder in (("default", out), ("a", out / "a")):
        model.set_adapter(name)
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), logits(model))
        assert (folder / "notes.txt").read_text() == "mine"
        card = (folder / "README.md").read_text()
        assert "My own words." in card
        assert card.count("import peft_sparse") == (2 if name == "default" else 1)
    assert not any(name.startswith(".") for name in os.listdir(out))


@pytest.mark.parametrize("kind", TYPES)
def test_weights_in_the_other_form_are_not_loaded_instead(tmp_path, kind):
    model = changed(saved(kind, tmp_path, "default", "a"))
    before = content(tmp_path)
    model.save_pretrained(tmp_path, selected_adapters=["a"], safe_serialization=False)
    model.set_adapter("a")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "a")), logits(model))
    assert sorted(content(tmp_path / "a")) == ["README.md", "adapter_config.json", "adapter_model.bin", "notes.txt"]
    assert content(tmp_path)[WEIGHTS] == before[WEIGHTS], "the other adapter was not saved"
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    assert sorted(content(tmp_path / "a")) == ["README.md", "adapter_config.json", WEIGHTS, "notes.txt"]


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_for_lora_touches_no_folder(tmp_path, kind):
    model = changed(saved(kind, tmp_path / "start"))
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion is for LoRA"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert content(tmp_path) == before


def test_processes_that_all_save_take_turns(tmp_path):
    model = adapted("SPARSE_FT", llama())
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                for _ in range(3):
                    model.save_pretrained(tmp_path / "out")
                code = 0
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "out")), logits(model))
    assert sorted(content(tmp_path / "out")) == ["README.md", "adapter_config.json", WEIGHTS]


def test_pefts_own_errors_are_told_by_peft(tmp_path):
    model = adapted("SPARSE_FT", llama())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path / "out", selected_adapters=["nobody"])
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    "card", [b"caf\xe9", b"---\na: [\n---\nMine.\n", b"---\n- a\n---\n", b"---\ntags: [{a: 1}]\n---\n"]
)
def test_a_card_that_cannot_be_understood_costs_no_weights(tmp_path, caplog, card):
    model = changed(saved("SPARSE_FT", tmp_path, "default", "a"))
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "README.md").write_bytes(card)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (tmp_path / "a" / "README.md").read_bytes() == card
    assert f"The model card {tmp_path / 'a' / 'README.md'} was left as it is" in caplog.text
    for name, folder in (("default", tmp_path), ("a", tmp_path / "a")):
        model.set_adapter(name)
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), logits(model))
