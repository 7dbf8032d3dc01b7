"""The folder in which PEFT's tests run: the tests of the sdist, the models they name, and what the sdist leaves out."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from . import tiny_models

_CONFTEST = '''\
"""Stands in for PEFT's conftest, which the sdist leaves out: a deprecation that transformers logs is an error."""

import logging


class DeprecationLogged(logging.Handler):
    def emit(self, record):
        if "is deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


def pytest_configure(config):
    logging.getLogger("transformers").addHandler(DeprecationLogged())
'''
_DIFFUSERS = '''\
"""Stands in for diffusers, which PEFT's shared helpers import for Stable Diffusion tests that are not run here."""


__version__ = "0"


class StableDiffusionPipeline:
    pass
'''
_PARAMETERIZED = '''\
"""Stands in for parameterized, which tests of PEFT's helpers use that are not run here."""

import pytest


class parameterized:
    @staticmethod
    def expand(cases):
        return pytest.mark.skip(reason="parameterized is not installed")
'''
_PYTEST_INI = """\
[pytest]
markers =
    single_gpu_tests: PEFT's
    multi_gpu_tests: PEFT's
    regression: PEFT's
    bitsandbytes: PEFT's
filterwarnings =
    error::DeprecationWarning:transformers
    error::FutureWarning:transformers
    # Newer transformers than this PEFT was tested with: PEFT and its tests ask for old names, whatever the tuner.
    ignore:.*gradient_checkpointing:FutureWarning
"""


def find_sdist(cache: Path) -> Path:
    """The sdist of the installed PEFT, from `cache` or from the package index."""
    release = version("peft")
    sdist = cache / f"peft-{release}.tar.gz"
    if not sdist.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            f"peft=={release}",
        ]
        subprocess.run([*command, "--dest", str(cache)], check=True)
    return sdist


def set_up(folder: Path, sdist: Path) -> None:
    """Unpack the tests of `sdist` into `folder` and lay everything that they need beside them."""
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                member.name = str(Path(*parts[1:]))
                archive.extract(member, folder, filter="data")
    if not (folder / "tests").is_dir():
        raise SystemExit(f"{sdist} holds no tests: it must be the sdist of peft, not a wheel.")
    (folder / "tests" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "tests" / "conftest.py").write_text(_CONFTEST, encoding="utf-8")
    (folder / "pytest.ini").write_text(_PYTEST_INI, encoding="utf-8")
    for package, source in (("diffusers", _DIFFUSERS), ("parameterized", _PARAMETERIZED)):
        if find_spec(package) is None:
            (folder / f"{package}.py").write_text(source, encoding="utf-8")
    tiny_models.create(folder)
