"""An adapter as large as the published language adapters: time and memory."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from peft_sparse.checkpoints.adapter_files import read_adapter

COUNT = 7_667_712
SHAPES = [(119_547, 768)] + [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12

CODE = """
import json, resource, sys, time
from peft_sparse import import_adapter
import peft_sparse.importing.import_adapter
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
import_adapter(sys.argv[1], sys.argv[2])
seconds = time.process_time() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "megabytes": (peak - before) / 1024}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes only there")
def test_seven_million_weights_take_five_seconds_and_500_mb(tmp_path):
    rng = np.random.default_rng(0)
    total = sum(rows * columns for rows, columns in SHAPES)
    diffs, expected = {}, {}
    for number, (rows, columns) in enumerate(SHAPES):
        count = round(COUNT * rows * columns / total)
        flat = np.unique(rng.integers(0, rows * columns, int(count * 1.03)))[:count]
        steps = np.diff(flat, prepend=0).tolist()
        steps[0] = np.int64(steps[0])
        name = f"bert.encoder.layer.{number}.x.weight" if number else "bert.embeddings.word_embeddings.weight"
        values = torch.randn(len(flat))
        diffs[name] = {"size": torch.Size((rows, columns)), "index_steps": steps, "values": values}
        expected[name] = (flat, values)
    (tmp_path / "sft").mkdir()
    torch.save({"diffs": diffs, "abs": {}}, tmp_path / "sft" / "pytorch_diff.bin")
    run = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "sft", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    measured = json.loads(run.stdout)
    found = read_adapter(tmp_path / "out").deltas
    for name, (flat, values) in expected.items():
        rows, columns = found[name].shape
        order = np.argsort(flat % rows * columns + flat // rows)
        assert torch.equal(found[name].values, values[torch.from_numpy(order)])
    assert measured["seconds"] < 5, measured
    assert measured["megabytes"] < 500, measured
