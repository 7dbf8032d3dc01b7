from __future__ import annotations

import sys
from pathlib import Path

# The processes that are started look for modules where this one does.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "training"))
