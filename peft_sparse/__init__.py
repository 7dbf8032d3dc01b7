"""Sparse fine-tuning and cross-lingual adapters for PEFT. Importing this package registers its tuner types.

What it offers, and where each name lives, is written in `__init__.pyi` alone. Names are loaded when they are asked for:
trainers import transformers' trainer, which is slow, and `SparseSFTTrainer` imports TRL, which is optional.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# What is imported under a name with an underscore registers something: methods, their drivers, callbacks of trainers.
from ._names import lazy, read_stub
from ._peft_bridge import register
from .training import fitted_rate as _fitted_rate  # noqa: F401
from .training import merged as _merged  # noqa: F401
from .training import part_rates as _part_rates  # noqa: F401
from .training import skipped_inverses as _skipped_inverses  # noqa: F401
from .training import stacked_adapters as _stacked_adapters  # noqa: F401
from .training.phases import unfinished as _unfinished  # noqa: F401
from .training.spiel import start as _start  # noqa: F401
from .tuners.ada_sft.config import AdaSftConfig as AdaSftConfig
from .tuners.ada_sft.model import AdaSftModel as AdaSftModel
from .tuners.bottleneck.config import BottleneckConfig as BottleneckConfig
from .tuners.bottleneck.model import BottleneckModel as BottleneckModel
from .tuners.common.loading import guard_loading
from .tuners.common.saving import guard_saving
from .tuners.madg.config import MadGConfig as MadGConfig
from .tuners.madg.model import MadGModel as MadGModel
from .tuners.sparse_ft.configs import one_shot as _one_shot  # noqa: F401
from .tuners.sparse_ft.configs import spiel as _spiel  # noqa: F401
from .tuners.sparse_ft.configs import two_phase as _two_phase  # noqa: F401
from .tuners.sparse_ft.configs.base import SparseConfig as SparseConfig
from .tuners.sparse_ft.expected_files import tell_of_files
from .tuners.sparse_ft.model import SparseModel as SparseModel

__version__ = "0.1.0"

_HOMES, _PUBLIC = read_stub(Path(__file__).with_suffix(".pyi"))
# A star import takes all of them, and must not fail where TRL is not installed.
__all__ = [name for name in _PUBLIC if name != "SparseSFTTrainer" or find_spec("trl") is not None]

register("SPARSE_FT", SparseConfig, SparseModel)
register("BOTTLENECK", BottleneckConfig, BottleneckModel)
register("MAD_G", MadGConfig, MadGModel)
register("ADA_SFT", AdaSftConfig, AdaSftModel)
guard_loading()
guard_saving()
tell_of_files()


__getattr__ = lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
