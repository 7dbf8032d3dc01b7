"""The pictures of the API reference can be drawn, without the tools that build its pages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PICTURES = Path(__file__).parents[2] / "reference" / "pictures.py"


@pytest.mark.slow
def test_every_picture_is_drawn(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("pictures", PICTURES)
    pictures = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "pictures", pictures)  # for its dataclass
    specification.loader.exec_module(pictures)
    folder, scratch = tmp_path / "pictures", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    pictures.draw(folder, scratch)
    assert {path.stem for path in folder.glob("*.svg")} == {picture.name for picture in pictures.PICTURES}
    text = (folder / "tokens.svg").read_text(encoding="utf-8")
    assert "of 48" in text
    assert "konu" in text  # a token of the invented tokenizer
