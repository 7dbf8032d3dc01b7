"""The examples as modules of this process: imported by name, as their own scripts import each other."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer import Typer
from typer.testing import CliRunner

from tests.support.models import llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def save_llama_of_letters(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A tiny Llama in a folder, and a tokenizer that knows letters."""
    letters = ["<unk>", "<eos>", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    sizes = {"num_key_value_heads": 2, "max_position_embeddings": 2048, **sizes}
    llama(vocab_size=len(letters), bos_token_id=None, eos_token_id=1, **sizes).to(dtype).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def importing(*folders: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Import modules of these folders by name; afterwards none of the examples' is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(str(folder))
        try:
            yield importlib.import_module
        finally:
            for name, module in list(sys.modules.items()):
                if str(EXAMPLES) in str(getattr(module, "__file__", "")):
                    del sys.modules[name]


def run(module: ModuleType, output: Path, *arguments: object) -> tuple[int, str]:
    """Run an example's command line in this process; returns (exit code, output with single spaces)."""
    app = Typer()
    app.command()(module.main)
    module.console.width = 200
    with module.console.capture() as captured:
        result = CliRunner().invoke(app, [*map(str, arguments), "--output", str(output)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", captured.get() + result.output)
