"""A folder that is not there is answered with the one that was meant."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from peft_sparse import ConfigError, inspect_adapter
from peft_sparse.checkpoints import adapter_files


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
