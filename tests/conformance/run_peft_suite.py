"""Run PEFT's own test-suite over the configs of peft_sparse.

    python tests/conformance/run_peft_suite.py                        # everything; the sdist is downloaded once
    python tests/conformance/run_peft_suite.py --sdist peft-0.21.2.tar.gz
    python tests/conformance/run_peft_suite.py -- -k test_merge_layers -x   # what follows -- goes to pytest

What is not run, and why, stands in `peft_suite/deselected.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peft_suite import deselected, workplace  # noqa: E402


def run(sdist: Path | None, cache: Path, pytest_arguments: list[str]) -> tuple[int, dict]:
    """Run the suite in a temporary folder; returns pytest's exit status and the plugin's report."""
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as name:
        folder = Path(name)
        workplace.set_up(folder, sdist or workplace.find_sdist(cache))
        report = folder / "report.json"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(folder), str(HERE), str(HERE.parent.parent)]),
            "PEFT_SUITE_REPORT": str(report),
            # Only a whole run can tell that an entry of the table matches no test any more.
            "PEFT_SUITE_WHOLE": "0" if pytest_arguments else "1",
        }
        files = [str(Path("tests", file)) for file in deselected.RUN_FILES]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "peft_suite.plugin",
            "-p",
            "no:cacheprovider",
            "-c",
            "pytest.ini",
        ]
        status = subprocess.run(
            [*command, "-q", "--timeout=300", *files, *pytest_arguments], cwd=folder, env=environment
        ).returncode
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        listed = set(deselected.FILES) | set(deselected.RUN_FILES)
        shipped = {file.name for file in (folder / "tests").glob("test_*.py")}
        drift = [f"{file}: in PEFT's tests, not in deselected.py" for file in sorted(shipped - listed)]
        drift += [f"{file}: in deselected.py, not in PEFT's tests" for file in sorted(listed - shipped)]
        if drift:
            found["problems"] = [*found.get("problems", []), *drift]
            status = status or 1
    return status, found


def show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="PEFT's tests over our configs")
    table.add_column("outcome")
    table.add_column("tests", justify="right")
    table.add_column("reason", overflow="fold")
    for outcome, count in report.get("outcomes", {}).items():
        if outcome not in ("skipped", "expected failure"):
            table.add_row(outcome, str(count), "")
    for title in ("expected", "skipped", "deselected"):
        for reason, count in sorted(report.get(title, {}).items(), key=lambda pair: -pair[1]):
            table.add_row(title, str(count), reason)
    console = Console()
    console.print(table)
    for problem in sorted(set(report.get("problems", []))):
        console.print(f"problem: {problem}", markup=False, style="red", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="the sdist of the installed PEFT (default: downloaded into --cache)")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft-sparse-sdist"
    parser.add_argument(
        "--cache", type=Path, default=default_cache, help="where downloaded sdists are kept (default: %(default)s)"
    )
    parser.add_argument("pytest_arguments", nargs="*", help="arguments for pytest, after --")
    arguments = parser.parse_args()
    status, report = run(arguments.sdist and arguments.sdist.resolve(), arguments.cache, arguments.pytest_arguments)
    show(report)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
