"""Pytest plugin that points PEFT's own tests at the configs of this library. PEFT's files are not changed.

- Where a test is parametrised over configs, the parameters are ours (`cases.py`).
- Where a test names `LoraConfig` for want of a better example, the name gives one of our configs while it runs.
- Where a helper skips every class that is not on a list of PEFT's, our class is on the list (`ON_THE_LIST`).
- `deselected.py` says what is not run, what must fail and which skips are right, each with its reason. The run fails
  when that table and PEFT's tests drift apart.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from peft_sparse.checkpoints import card, card_rows

from . import cases, deselected

TASKS = {
    "test_decoder_models": "CAUSAL_LM",
    "test_encoder_decoder_models": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
    "test_seq_classifier": "SEQ_CLS",
}
# Classes that PEFT's helpers compare with: {what the test is called: the names that our class takes while it runs}.
ON_THE_LIST = {
    r".*(test_mixed_adapter_batches|test_generate_with_mixed_adapter_batches)": ("LoraConfig",),
    r".*test_weighted_combination_of_adapters": ("IA3Config",),
}

# Helpers that skip what another tuner cannot do, and us with it: GPT2's Conv1D; and every tuner on Llama and Gemma, for
# BEFT's want of biases (it asks isinstance where it means issubclass).
SKIPPERS = ("_skip_if_conv1d_not_supported", "check_beft_config")


def key_of(module: str, cls: type | None, function: str) -> str:
    """What the tables call a test: file::Class::function, without its parameters."""
    return "::".join([module.rpartition(".")[2], *([cls.__name__] if cls else []), function])


def our_values(key: str, names: list[str], values: list[Any]) -> list[Any] | None:
    """The parameters that take the place of PEFT's, or None where PEFT's own stay."""
    module = key.partition("::")[0]
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return cases.CUSTOM_MODELS
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        return cases.TWO_ADAPTERS
    if names == ["config_class", "mandatory_kwargs"]:
        return cases.WITH_MANDATORY
    if names == ["config_cls"]:
        return cases.CLASSES
    if names == ["config_cls", "config_kwargs"]:
        if module == "test_quantization":
            return cases.QUANTISED
        if "TokenClassification" in key or "QuestionAnswering" in key:
            return cases.on_hub_models("TOKEN_CLS" if "TokenClassification" in key else "QUESTION_ANS")
        if module in TASKS:
            return cases.on_hub_models(TASKS[module])
    return translated(values)


def translated(values: list[Any]) -> list[Any] | None:
    """PEFT's parameters with our config in the place of each LoraConfig; rows with other tuners' are left out."""
    rows, found = [], False
    for row in values:
        entries = row.values if hasattr(row, "marks") else row
        entries = entries if isinstance(entries, (tuple, list)) else (entries,)
        configs = [entry for entry in entries if isinstance(entry, PeftConfig)]
        found = found or bool(configs)
        if not all(type(config) is LoraConfig for config in configs):
            continue
        swapped = tuple(cases.translate(entry) if isinstance(entry, LoraConfig) else entry for entry in entries)
        if all(entry is not None or old is None for entry, old in zip(swapped, entries, strict=True)):
            rows.append(swapped if len(swapped) > 1 else swapped[0])
    return rows if found else None


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    definition = metafunc.definition
    key = key_of(metafunc.module.__name__, metafunc.cls, definition.originalname)
    for position, mark in enumerate(definition.own_markers):
        if mark.name != "parametrize":
            continue
        names = mark.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        ours = our_values(key, names, list(mark.args[1]))
        if ours is not None:
            definition.own_markers[position] = pytest.mark.parametrize(mark.args[0], ours).mark


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ledger = config.stash[LEDGER]
    kept, dropped = [], []
    for item in items:
        key = key_of(item.module.__name__, item.cls, item.originalname)
        ledger.functions.add(key)
        reason = ledger.look_up("NOT_OURS", key)
        if reason is not None:
            ledger.deselected[reason] += 1
            dropped.append(item)
            continue
        case = f"[{item.callspec.id}]" if hasattr(item, "callspec") else ""
        expected = ledger.look_up("EXPECTED_FAILURES", key + case)
        if expected is not None:
            item.add_marker(pytest.mark.xfail(raises=expected.how, reason=expected.why, strict=True))
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _folders_are_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models lie in folders that are called like repositories of the Hub, and a model card names no folder."""
    for module in (card, card_rows):
        monkeypatch.setattr(module, "is_hub_id", lambda name: bool(name) and card_rows._HUB_ID.fullmatch(name))


@pytest.fixture(autouse=True)
def _our_names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put our classes where the test, or PEFT's shared helpers, look for another one."""
    from tests import testing_common

    item = request.node
    key = key_of(item.module.__name__, item.cls, item.originalname)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for module in (item.module, testing_common):
        for name in SKIPPERS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_: None)
    config_cls = parameters.get("config_cls")
    if config_cls is None:
        if hasattr(item.module, "LoraConfig"):
            monkeypatch.setattr(item.module, "LoraConfig", cases.StandIn)
    else:
        for pattern, names in ON_THE_LIST.items():
            if re.fullmatch(pattern, key):
                for module in (item.module, testing_common):
                    for name in names:
                        monkeypatch.setattr(module, name, config_cls, raising=False)


class Ledger:
    """What became of every test, and which table entries were used."""

    def __init__(self) -> None:
        self.functions: set[str] = set()
        self.deselected: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.expected: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.strange_skips: dict[str, list[str]] = {}
        self.problems: list[str] = []
        self._used: set[tuple[str, str]] = set()

    def look_up(self, table: str, text: str) -> Any:
        for pattern, reason in getattr(deselected, table).items():
            if re.fullmatch(pattern, text):
                self._used.add((table, pattern))
                return reason
        return None

    def unused(self) -> list[str]:
        tables = ("NOT_OURS", "EXPECTED_FAILURES", "SKIPS")
        every = {(table, pattern) for table in tables for pattern in getattr(deselected, table)}
        return [f"deselected.{table}: {pattern!r} matches no test" for table, pattern in sorted(every - self._used)]


LEDGER = pytest.StashKey[Ledger]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = Ledger()
    config.pluginmanager.register(_Recorder(config), "peft-suite-recorder")


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self._config, self._ledger = config, config.stash[LEDGER]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ledger = self._ledger
        if report.failed:
            ledger.outcomes["failed"] += 1
        elif report.skipped and hasattr(report, "wasxfail"):
            ledger.outcomes["expected failure"] += 1
            ledger.expected[report.wasxfail] += 1
        elif report.skipped:
            ledger.outcomes["skipped"] += 1
            said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = ledger.look_up("SKIPS", said.removeprefix("Skipped: "))
            if reason is None:
                ledger.strange_skips.setdefault(said, []).append(report.nodeid)
            else:
                ledger.skipped[reason] += 1
        elif report.when == "call":
            ledger.outcomes["passed"] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        ledger = self._ledger
        for said, tests in ledger.strange_skips.items():
            ledger.problems.append(
                f"{len(tests)} skipped for a reason that deselected.SKIPS does not know: {said!r}, as {tests[0]}"
            )
        if os.environ.get("PEFT_SUITE_WHOLE") == "1":
            ledger.problems += ledger.unused()
        if ledger.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        target = os.environ.get("PEFT_SUITE_REPORT")
        if target:
            names = ("outcomes", "expected", "skipped", "deselected", "problems")
            Path(target).write_text(json.dumps({name: getattr(ledger, name) for name in names}), encoding="utf-8")
