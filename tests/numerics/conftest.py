from __future__ import annotations

import sys
from pathlib import Path

# Cases that the tests of other folders are made of, see test_gpu.py.
sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("unit/tuners", "unit/training", "distributed"))
