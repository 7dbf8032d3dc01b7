"""The typological vectors of an adapter: from what a user gives to what is saved with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...typology import Typology, load_typology
from ...typology.saved import SavedTypology


def check_typology(given: Any) -> None:
    """Refuse what no typology can be made of; no file is opened.

    Raises:
        ConfigError: it is none of what `as_typology` takes.
    """
    if not (given is None or isinstance(given, (str, PathLike, Mapping, Typology))):
        raise ConfigError(
            "typology must be what load_typology() gives, a dictionary {language code: vector}, the path of a file or "
            f"None, got {type(given).__name__}."
        )


def as_typology(given: Any, features: Sequence[str]) -> Typology:
    """A typology from what a user may give: one, {code: vector}, the path of a file, or None for the default.

    Args:
        given: see above.
        features: sets of features to read, where a file is read.

    Raises:
        ConfigError: it is none of these.
    """
    check_typology(given)
    if isinstance(given, Typology):
        return given
    if isinstance(given, Mapping):
        return Typology.from_vectors(given)
    return load_typology(given, features=tuple(features))


def save_vector(saved: dict[str, Any], code: str, vector: Tensor) -> None:
    """Put a language's vector into what is saved of a typology (`Typology.to_dict`), in place.

    It is saved under the code that it was asked for by: that alone tells later which vector the adapter used.
    """
    names = tuple(saved["feature_names"])
    one = SavedTypology(saved["source"], saved["version"], saved["digest"], names, {code: vector})
    saved["vectors"].update(one.to_dict()["vectors"])


def saved_vectors(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """{code: vector [F]} of the languages that are saved with an adapter.

    Raises:
        FormatError: the file is damaged.
    """
    return dict(SavedTypology.from_dict(saved).vectors)


def digest_of(feature_names: Sequence[str]) -> Tensor:
    """A hash of the features' names that travels among the weights: uint8 [32]."""
    return torch.tensor(list(hashlib.sha256(json.dumps(list(feature_names)).encode()).digest()), dtype=torch.uint8)
