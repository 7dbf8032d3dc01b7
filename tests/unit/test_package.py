"""The package as a whole: what importing it does, which way its imports point, and its place in PEFT."""

from __future__ import annotations

import ast
import functools
import inspect
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_sparse
from peft_sparse import _peft_bridge

ROOT = Path(peft_sparse.__file__).parent
# A package may import those before it in its own row and all rows above.
RANKS = [
    ["errors", "_names", "_peft_bridge"],
    ["files", "checks", "untrusted", "tables", "lines"],
    ["core"],
    ["selection", "typology", "parsing"],
    ["optim"],
    ["composition"],
    ["checkpoints"],
    ["tuners"],
    ["training"],
    ["distillation", "planning", "inspection", "extraction", "importing"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


@functools.cache
def nodes_of(code: str) -> list[ast.AST]:
    """Of a file of the package, at any depth: four tests look through all of them."""
    return list(ast.walk(ast.parse(code)))


def imported_packages(file: Path) -> set[str]:
    """Top-level names of peft_sparse that a file imports, relative or absolute, at any depth of the code."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in nodes_of(file.read_text()):
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
    "ada_sft/to_sparse.py": {"sparse_ft.allocation"},
}


def taken_from_siblings(file: Path) -> set[str]:
    """Modules of other tuners that a tuner's file imports, relative to `tuners`."""
    inside = file.relative_to(ROOT).with_suffix("").parts
    found: set[str] = set()
    for node in nodes_of(file.read_text()):
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


def test_importing_loads_no_optional_package(interpreter):
    # PEFT itself imports bitsandbytes where it is installed, so count what comes on top of PEFT and transformers.
    code = (
        "import sys, peft, transformers; before = set(sys.modules); import peft_sparse; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} & "
        "{'trl', 'bitsandbytes', 'triton', 'matplotlib', 'datasets'}))"
    )
    assert interpreter.run(code).stdout.strip() == "[]"


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


@pytest.mark.parametrize("version", ["0.20.1.dev0", "0.20.9", "0.9"])
def test_a_peft_that_is_too_old_is_refused(version):
    with pytest.raises(ImportError, match=r"supports peft >= 0\.21, found "):
        _peft_bridge.check_peft_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.9.post1"])
def test_a_tested_peft_is_accepted(version):
    _peft_bridge.check_peft_version.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _peft_bridge.check_peft_version(version)


@pytest.mark.parametrize("version", ["0.22.0.dev0", "0.22.0", "1.0"])
def test_a_newer_minor_version_warns_once(version):
    _peft_bridge.check_peft_version.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _peft_bridge.check_peft_version(version)
    assert [f"peft {version} is newer than" in str(w.message) for w in caught] == [True]


@pytest.mark.parametrize("internal", _peft_bridge.INTERNALS, ids=lambda internal: internal.name)
def test_an_internal_that_is_gone_is_named(internal, monkeypatch):
    assert (ROOT.parent / internal.test).is_file()
    found = _peft_bridge.find(internal)
    lost = internal._replace(members=("_no_such_hook",))
    with pytest.raises(ImportError, match=rf"builds on {internal.module}\.{internal.name}\._no_such_hook, which peft "):
        _peft_bridge.find(lost)
    assert found is _peft_bridge.find(internal)
    monkeypatch.delattr(import_module(internal.module), internal.name)
    with pytest.raises(ImportError, match=rf"builds on {internal.module}\.{internal.name}, which peft "):
        _peft_bridge.find(internal)


def test_importing_with_a_hook_gone_and_with_an_untested_version(interpreter):
    # In a process of its own, for peft_sparse is imported anew.
    code = """
import warnings, peft, torch
from peft.tuners.tuners_utils import BaseTuner
hook = BaseTuner._inject_parameters
del BaseTuner._inject_parameters
try:
    import peft_sparse
except ImportError as error:
    print(error)
BaseTuner._inject_parameters = hook
peft.__version__ = "0.99.1"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_sparse
    for _ in range(2):
        base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = peft.get_peft_model(base, peft_sparse.RandConfig(density=0.5, target_modules=["0"]))
print(sum("peft 0.99.1 is newer than the newest minor version" in str(w.message) for w in caught))
print(model.get_nb_trainable_parameters()[0])
"""
    gone, warned, trainable = interpreter.run(code).stdout.splitlines()
    assert gone.startswith("peft_sparse builds on peft.tuners.tuners_utils.BaseTuner._inject_parameters, which peft 0.")
    assert (warned, trainable) == ("1", "8")


def names_in(code: str) -> set[str]:
    """Names of attributes and of functions in code."""
    nodes = nodes_of(code)
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {
        n.name for n in nodes if isinstance(n, ast.FunctionDef)
    }


# A method of our layers that PEFT has under the same name in classes that these do not derive from.
OUR_OWN = {"_mixed_batch_forward"}


def test_private_members_of_peft_that_the_package_touches_are_listed():
    found = [_peft_bridge.find(internal) for internal in _peft_bridge.INTERNALS]
    classes = [cls for one in found if isinstance(one, type) and one is not PeftType for cls in one.__mro__]
    theirs = {name for cls in classes if cls.__module__.startswith("peft.") for name in vars(cls)}
    private = {name for name in theirs if name.startswith("_") and not name.startswith("__")}
    listed = {member for internal in _peft_bridge.INTERNALS for member in internal.members}
    files = [file for file in ROOT.rglob("*.py") if file.name != "_peft_bridge.py"]
    touched = {name for file in files for name in names_in(file.read_text()) & private}
    assert "_inject_parameters" in touched
    assert touched - listed == OUR_OWN


def refused_parameters(theirs: Callable, ours: Callable) -> list[str]:
    """What a call of PEFT's may pass that an override of it does not take."""
    taken = inspect.signature(ours).parameters
    kinds = {parameter.kind for parameter in taken.values()}
    names = []
    for name, parameter in inspect.signature(theirs).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            names += [str(parameter)] if parameter.kind not in kinds else []
        elif name not in taken and parameter.VAR_KEYWORD not in kinds:
            names.append(name)
    return names


def overrides(cls: type) -> list[tuple[str, Callable, Callable]]:
    """(name, PEFT's, ours) for each method of PEFT's classes that a class of ours overrides."""
    return [
        (f"{cls.__name__}.{name}", theirs, getattr(cls, name))
        for base in cls.__mro__
        if base.__module__.startswith("peft.")
        for name, theirs in vars(base).items()
        if inspect.isfunction(theirs) and name != "__init__" and getattr(cls, name) is not theirs
    ]


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(below) for below in cls.__subclasses__()))


def test_overrides_take_what_peft_passes():
    bases = (_peft_bridge.BaseTuner, _peft_bridge.BaseTunerLayer, PeftConfig)
    ours = {c for base in bases for c in subclasses(base) if c.__module__.startswith("peft_sparse.")}
    found = [override for cls in ours for override in overrides(cls)]
    assert {"SparseModel.inject_adapter", "BottleneckModel._create_and_replace", "MadGModel.merge_and_unload"} <= {
        name for name, _, _ in found
    }
    assert {name: refused_parameters(*both) for name, *both in found if refused_parameters(*both)} == {}
    assert refused_parameters(lambda a, *b, c, **d: 0, lambda a: 0) == ["*b", "c", "**d"]


def private_imports(code: str) -> list[str]:
    """Names that code imports from PEFT's modules below `peft` and `peft.utils`, or that begin with an underscore."""
    return [
        f"{node.module}.{alias.name}"
        for node in nodes_of(code)
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft"
        for alias in node.names
        if node.module not in ("peft", "peft.utils") or alias.name.startswith("_")
    ]


def test_only_the_bridge_imports_internals_of_peft():
    assert private_imports("from peft.utils.other import x\nfrom peft import _y, z") == [
        "peft.utils.other.x",
        "peft._y",
    ]
    files = [file for file in ROOT.rglob("*.py") if file.name != "_peft_bridge.py"]
    assert {file.name: private_imports(file.read_text()) for file in files if private_imports(file.read_text())} == {}
