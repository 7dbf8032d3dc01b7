"""The package as a whole: what importing it does, which way its imports point, and its place in PEFT."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_sparse
from peft_sparse import _peft_bridge

ROOT = Path(peft_sparse.__file__).parent
# A package may import those before it in its own row and all rows above.
RANKS = [
    ["errors", "_names", "_peft_bridge"],
    ["files", "checks", "untrusted", "tables"],
    ["core"],
    ["selection", "typology"],
    ["optim"],
    ["composition"],
    ["checkpoints"],
    ["tuners"],
    ["training"],
    ["distillation", "planning", "inspection", "extraction", "importing"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def imported_packages(file: Path) -> set[str]:
    """Top-level names of peft_sparse that a file imports, relative or absolute, at any depth of the code."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            path = [*inside[: len(inside) - node.level], *(node.module or "").split(".")]
        elif (node.module or "").startswith("peft_sparse"):
            path = node.module.split(".")[1:]
        else:
            continue
        path = [part for part in path if part]
        found.update(path[:1] or [alias.name for alias in node.names])
    return found


def violations(file: Path, imports: set[str]) -> list[str]:
    own = file.relative_to(ROOT).with_suffix("").parts[0]
    return [f"{own} -> {other}" for other in imports if other in RANK and RANK[other] > RANK[own]]


def test_imports_point_one_way():
    files = [f for f in ROOT.rglob("*.py") if f != ROOT / "__init__.py"]
    assert {f.relative_to(ROOT).with_suffix("").parts[0] for f in files} <= set(RANK)
    assert [v for f in files for v in violations(f, imported_packages(f))] == []


# What one tuner may take out of another: MAD-G generates bottleneck adapters, Ada-SFT's `to_sparse` gives sparse ones.
BETWEEN_TUNERS = {
    "madg": {"bottleneck"},
    "ada_sft/config.py": {"sparse_ft.configs.base"},
    "ada_sft/to_sparse.py": {"sparse_ft.configs.base", "sparse_ft.allocation"},
}


def taken_from_siblings(file: Path) -> set[str]:
    """Modules of other tuners that a tuner's file imports, relative to `tuners`."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            up = list(inside[: len(inside) - node.level]) if node.level else []
            path = [part for part in [*up, *(node.module or "").removeprefix("peft_sparse.").split(".")] if part]
            if path[:1] == ["tuners"]:
                found.update([".".join(path[1:])] if path[1:] else [alias.name for alias in node.names])
    return {name for name in found if name.partition(".")[0] not in (inside[1], "common")}


def test_no_tuner_imports_the_internals_of_a_sibling():
    tuners = ROOT / "tuners"
    refused = []
    for file in [f for f in tuners.rglob("*.py") if f.parent != tuners]:
        name = file.relative_to(tuners).as_posix()
        allowed = BETWEEN_TUNERS.get(name, BETWEEN_TUNERS.get(name.partition("/")[0], set()))
        refused += [f"{name} <- {m}" for m in taken_from_siblings(file) if not {m, m.partition(".")[0]} & allowed]
    assert refused == []
    assert taken_from_siblings(tuners / "ada_sft" / "to_sparse.py") == BETWEEN_TUNERS["ada_sft/to_sparse.py"]


def test_the_import_check_sees_an_upward_import():
    assert violations(ROOT / "core" / "delta.py", {"tuners"}) == ["core -> tuners"]
    assert "core" in imported_packages(ROOT / "tuners" / "sparse_ft" / "layers" / "base.py")


def test_importing_loads_no_optional_package():
    # PEFT itself imports bitsandbytes where it is installed, so count what comes on top of PEFT and transformers.
    code = (
        "import sys, peft, transformers; before = set(sys.modules); import peft_sparse; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} & "
        "{'trl', 'bitsandbytes', 'triton', 'matplotlib', 'datasets'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_works_without_the_optional_packages():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['trl', 'bitsandbytes', 'triton', 'matplotlib'])); "
        "import peft_sparse; print(peft_sparse.RandConfig(density=0.5).peft_type.value)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "SPARSE_FT"


def test_sparse_ft_is_a_real_peft_type():
    member = PeftType.SPARSE_FT
    assert member in list(PeftType)
    assert PeftType("SPARSE_FT") is member is PeftType["SPARSE_FT"]
    assert pickle.loads(pickle.dumps(member)) is member
    assert (member.value, str(member), member == "SPARSE_FT") == ("SPARSE_FT", "PeftType.SPARSE_FT", True)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is peft_sparse.SparseConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_sparse.SparseModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "sparse_ft_"


def test_ada_sft_is_a_real_peft_type():
    member = PeftType("ADA_SFT")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is peft_sparse.AdaSftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is peft_sparse.AdaSftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "ada_sft_"


def test_registering_again_changes_nothing():
    before = list(PeftType)
    _peft_bridge.register("SPARSE_FT", dict, dict)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPARSE_FT] is peft_sparse.SparseConfig


def test_add_member_makes_a_member_like_the_others():
    class Color(str, Enum):
        RED = "RED"

    blue = _peft_bridge.add_member(Color, "BLUE")
    assert [c.name for c in Color] == ["RED", "BLUE"]
    assert Color.BLUE is blue is Color("BLUE") is Color["BLUE"] is _peft_bridge.add_member(Color, "BLUE")
    assert isinstance(blue, Color)
    assert {blue: 1}["BLUE"] == 1


@pytest.mark.parametrize("version", ["0.20.1.dev0", "0.20.9", "0.22.0", "0.22.0.dev0", "1.0"])
def test_an_unsupported_peft_is_refused(version):
    with pytest.raises(ImportError, match=r"supports peft >= 0\.21, < 0\.22, found "):
        _peft_bridge.check_peft_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.9.post1"])
def test_a_supported_peft_is_accepted(version):
    _peft_bridge.check_peft_version(version)
