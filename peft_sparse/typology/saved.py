"""What an adapter keeps of the typology that it was trained with: a form for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError

FORMAT = 1


@dataclass(frozen=True)
class SavedTypology:
    """`digest` is that of the whole table; `vectors` {code: [d]} are of some of its languages, or of none."""

    source: str
    version: str | None
    digest: str
    feature_names: tuple[str, ...]
    vectors: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source,
            "version": self.version,
            "digest": self.digest,
            "feature_names": list(self.feature_names),
            "vectors": {code: _packed(self.vectors[code]) for code in sorted(self.vectors)},
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> SavedTypology:
        """Raises FormatError if `to_dict` cannot have made it."""
        try:
            if saved["format"] != FORMAT:
                raise FormatError(
                    f"a saved typology must have format {FORMAT}, got {saved['format']!r}: a newer peft_sparse made it"
                )
            names = tuple(saved["feature_names"])
            if not names or not all(isinstance(name, str) for name in names):
                raise FormatError("a saved typology must name its features")
            vectors = {code: _unpacked(vector, len(names)) for code, vector in saved["vectors"].items()}
            found = cls(saved["source"], saved["version"], saved["digest"], names, vectors)
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            raise FormatError(f"a saved typology must be what Typology.to_dict gives ({error!r})") from error
        return found


def _packed(vector: Tensor) -> str | list[float]:
    """Eight 0/1 features a byte, in hexadecimal; other values as they are."""
    if bool(((vector == 0) | (vector == 1)).all()):
        return np.packbits(vector.numpy().astype(np.uint8)).tobytes().hex()
    return [float(value) for value in vector]


def _unpacked(vector: str | Sequence[float], width: int) -> Tensor:
    if isinstance(vector, str):
        try:
            packed = np.frombuffer(bytes.fromhex(vector), dtype=np.uint8)
        except ValueError as error:
            raise FormatError(f"a saved vector must be hexadecimal digits or numbers, got {vector[:20]!r}") from error
        bits = np.unpackbits(packed)
        if len(bits) - width not in range(8):
            raise FormatError(f"a saved vector must have the typology's {width} features, got {len(bits)} bits")
        return torch.from_numpy(bits[:width].astype(np.float32))
    if len(vector) != width:
        raise FormatError(f"a saved vector must have the typology's {width} features, got {len(vector)}")
    values = torch.tensor(vector, dtype=torch.float32)
    if values.dim() != 1 or not bool(values.isfinite().all()):
        raise FormatError("a saved vector must hold one finite number for each of the typology's features")
    return values
