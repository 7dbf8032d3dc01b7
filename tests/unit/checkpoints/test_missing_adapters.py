"""A folder that is not there is answered with the one that was meant."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from peft_sparse import ConfigError, inspect_adapter
from peft_sparse.checkpoints import adapter_files
from peft_sparse.files import check_output


def test_a_folder_of_nearly_the_same_name_is_named(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(adapter_files, "hf_hub_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "language").mkdir()
    (tmp_path / "langauge.txt").touch()  # a file is no adapter
    for given in ("langauge", f"{tmp_path}/langauge", "./langauge/"):
        with pytest.raises(ConfigError, match=r"There is no folder '.*langauge/?'.* Did you mean 'language'\?$"):
            inspect_adapter(given)
    for given in ("elsewhere", "./no/such/folder"):
        with pytest.raises(ConfigError) as error:
            inspect_adapter(given)
        assert "Did you mean" not in str(error.value)


def test_a_path_with_a_mistake_is_no_id_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def offline(*args, **kwargs):
        asked.append(args)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(adapter_files, "hf_hub_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ner" / "best").mkdir(parents=True)
    match = r"no folder 'runs/ner/bst', though there is 'runs'\. Did you mean 'best'\? .* name .*bst@main'"
    with pytest.raises(ConfigError, match=match):
        inspect_adapter("runs/ner/bst")
    assert not asked
    for given in ("runs/ner/bst@main", "elsewhere/ner/best", "runs/bst"):
        with pytest.raises(ConfigError, match="cannot be had from the Hub: no connection"):
            inspect_adapter(given)
    assert len(asked) == 3, "a Hub that cannot be reached is asked for one file of what is not in its cache"


def test_a_home_in_an_output_is_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"~/out begins with ~, which stands for a home only in a shell"):
        check_output("~/out", overwrite=False)
    assert not list(tmp_path.iterdir())
