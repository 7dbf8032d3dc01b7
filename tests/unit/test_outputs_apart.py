"""What is read is not written into: the folder of an input, under any spelling, is no output of any verb."""

from __future__ import annotations

import os

import pytest

from peft_sparse import export_adapter, extract_adapter, import_adapter, merge_checkpoint, reduce_adapter
from peft_sparse.distillation.shrink import shrink
from peft_sparse.errors import ConfigError
from tests.support.merging import save_adapter
from tests.support.models import llama

ANYWAY = {"overwrite": True}
CASES = {
    "merge, adapter": (lambda f: merge_checkpoint(f / "base", [f / "a"], f / "a", **ANYWAY), "a", "adapter"),
    "merge, link": (lambda f: merge_checkpoint(f / "base", [f / "a"], f / "link", **ANYWAY), "a", "adapter"),
    "merge, base": (lambda f: merge_checkpoint(f / "base", [f / "a"], f / "base", **ANYWAY), "base", "base checkpoint"),
    "extract, tuned": (
        lambda f: extract_adapter(f / "base", f / "tuned", f / "tuned", density=0.1, **ANYWAY),
        "tuned",
        "tuned model",
    ),
    "extract, base": (
        lambda f: extract_adapter(f / "base", f / "tuned", f / "base", density=0.1, **ANYWAY),
        "base",
        "base model",
    ),
    "export": (lambda f: export_adapter(f / "a", f / "a", to="shira", base=str(f / "base"), **ANYWAY), "a", "adapter"),
    "export, base": (
        lambda f: export_adapter(f / "a", f / "base", to="lora", rank=1, base=str(f / "base"), **ANYWAY),
        "base",
        "base model",
    ),
    "import": (lambda f: import_adapter(f / "a", f / "a", **ANYWAY), "a", "adapter"),
    "import, file": (lambda f: import_adapter(f / "sft" / "pytorch_diff.bin", f / "sft", **ANYWAY), "sft", "adapter"),
    "shrink": (lambda f: shrink(f / "base", f / "base", texts={"eng": ["a"]}, **ANYWAY), "base", "model"),
    "shrink, --like": (lambda f: reduce_adapter(f / "a", f / "a", vocabulary=f, **ANYWAY), "a", "adapter"),
}


@pytest.fixture
def folders(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    llama(seed=1).save_pretrained(tmp_path / "tuned")
    save_adapter(tmp_path, llama(), "a", target_modules="all-linear")
    export_adapter(tmp_path / "a", tmp_path / "sft")
    os.symlink(tmp_path / "a", tmp_path / "link")
    return tmp_path


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_verb_does_not_write_into_what_it_reads(folders, case):
    call, name, what = CASES[case]
    before = content(folders / name)
    with pytest.raises(ConfigError, match=rf"the output .* is the {what} itself\. Give another directory"):
        call(folders)
    assert content(folders / name) == before


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_not_written_beside_an_adapter(folders):
    save_adapter(folders, llama(), "b")
    before = content(folders / "b")
    with pytest.raises(ConfigError, match=r"b holds an adapter \(adapter_config\.json\), which transf"):
        merge_checkpoint(folders / "base", [folders / "a"], folders / "b", **ANYWAY)
    with pytest.raises(ConfigError, match="holds an adapter"):
        shrink(folders / "base", folders / "b", texts={"eng": ["a"]}, **ANYWAY)
    assert content(folders / "b") == before
