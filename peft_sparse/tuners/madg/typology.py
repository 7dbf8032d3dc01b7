"""The typological vectors of an adapter: where they come from, and what of them is saved with it."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, FormatError


@runtime_checkable
class Typology(Protocol):
    """What is needed of a source of typological vectors; `peft_sparse.typology` reads them from files.

    Attributes:
        feature_names: the names of the F features, in the order of the vectors.
        source, version: what the vectors were read from.
        digest: a hash of the data.
    """

    feature_names: Sequence[str]
    source: str
    version: str
    digest: str

    def vector(self, code: str) -> Tensor:
        """The vector of a language: float32 [F]. A ValueError if there is none."""
        ...


@dataclass(frozen=True)
class OwnVectors:
    """A user's own vectors as a typology.

    Attributes:
        vectors: {language code: [F]}.
        feature_names: names of the features; "0", "1", ... if none are given.
    """

    vectors: Mapping[str, Tensor]
    feature_names: Sequence[str] = ()
    source: str = "own vectors"
    version: str = ""

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ConfigError("typology must hold the vector of at least one language, got an empty dictionary.")
        rows = {code: torch.as_tensor(row, dtype=torch.float32).cpu() for code, row in self.vectors.items()}
        first = next(iter(rows.values()))
        for code, row in rows.items():
            if row.dim() != 1 or row.shape != first.shape or not row.numel():
                raise ConfigError(
                    f"typology must hold vectors of equal length, got shape {list(row.shape)} for {code!r} and "
                    f"{list(first.shape)} for {next(iter(rows))!r}."
                )
        names = list(self.feature_names) or [str(i) for i in range(len(first))]
        if len(names) != len(first):
            raise ConfigError(f"feature_names must name {len(first)} features, got {len(names)}.")
        object.__setattr__(self, "vectors", rows)
        object.__setattr__(self, "feature_names", names)

    @property
    def digest(self) -> str:
        """SHA-256 of names and vectors."""
        found = hashlib.sha256(json.dumps(list(self.feature_names)).encode())
        for code in sorted(self.vectors):
            found.update(code.encode() + b"\0" + _bytes(self.vectors[code]))
        return found.hexdigest()

    def vector(self, code: str) -> Tensor:
        """The vector of a language: float32 [F].

        Raises:
            ConfigError: there is none.
        """
        if code not in self.vectors:
            raise ConfigError(f"the given vectors have no language {code!r}; they have {sorted(self.vectors)}.")
        return self.vectors[code]


def as_typology(given: Any, features: Sequence[str]) -> Typology:
    """A typology from what a user may give: an object, {code: vector}, the path of a file, or None for the default.

    Args:
        given: see above.
        features: sets of features to read, where a file is read.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(given, Mapping):
        return OwnVectors(given)
    if given is None or isinstance(given, (str, PathLike)):
        from ...typology import load_typology

        return load_typology(given, features=tuple(features))
    if isinstance(given, Typology):
        return given
    raise ConfigError(
        "typology must be what load_typology() gives, a dictionary {language code: vector}, the path of a file or "
        f"None, got {type(given).__name__}."
    )


def new_record(typology: Typology) -> dict[str, Any]:
    """What is saved of a typology: where it comes from, the names of its features, and room for vectors."""
    return {
        "source": typology.source,
        "version": typology.version,
        "digest": typology.digest,
        "feature_names": list(typology.feature_names),
        "vectors": {},
    }


def check_same(record: Mapping[str, Any], typology: Typology) -> None:
    """Refuse a typology that is not the one an adapter was trained on.

    Args:
        record: what the adapter saved (`new_record`, with vectors).
        typology: the other one. More languages are welcome; other values are not.

    Raises:
        ConfigError: its features are named differently, or the vector of one of the saved languages is another one.
    """
    wanted, given = list(record["feature_names"]), list(typology.feature_names)
    trained_on = f"the adapter was trained on {record['source']} {record['version']}".rstrip()
    if wanted != given:
        missing = [name for name in wanted if name not in set(given)]
        detail = f"{missing[0]} is missing, for one" if missing else "there are more of them, or in another order"
        raise ConfigError(
            f"the typology has other features: {trained_on} with {len(wanted)} features, this one has {len(given)} "
            f"({detail}). Give the same source and feature sets."
        )
    if record["digest"] == typology.digest:
        return
    for code, packed in record["vectors"].items():
        try:
            other = typology.vector(code)
        except ValueError:
            continue
        if not torch.equal(unpack(packed), other.float().cpu()):
            raise ConfigError(
                f"the typology has another vector for {code!r}: {trained_on}, this is {typology.source} "
                f"{typology.version}, and every adapter generated from it would change. Give the version that the "
                "adapter was trained on."
            )


def vector_of(code: str, typology: Typology) -> Tensor:
    """A language's vector, checked: float32 [F].

    Raises:
        ConfigError: it is missing, of another length, or not finite.
    """
    try:
        vector = typology.vector(code).detach().float().cpu()
    except ConfigError:
        raise
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{typology.source} has no vector for the language {code!r}: {error}") from error
    if vector.shape != (len(typology.feature_names),) or not torch.isfinite(vector).all():
        raise ConfigError(
            f"the vector of {code!r} must hold {len(typology.feature_names)} finite numbers, got shape "
            f"{list(vector.shape)} and {int((~torch.isfinite(vector)).sum())} values that are not finite."
        )
    return vector


def pack(vector: Tensor) -> str:
    """A vector as text for a JSON file: base64 of its little-endian float32 values, compressed."""
    return base64.b64encode(zlib.compress(_bytes(vector), 9)).decode("ascii")


def unpack(text: str) -> Tensor:
    """What `pack` packed, exactly.

    Raises:
        FormatError: the text is damaged.
    """
    try:
        content = zlib.decompress(base64.b64decode(text, validate=True))
        return torch.from_numpy(np.frombuffer(content, dtype="<f4").astype(np.float32))
    except (ValueError, zlib.error) as error:
        raise FormatError(f"a typological vector in adapter_config.json is damaged: {error}") from error


def _bytes(vector: Tensor) -> bytes:
    return vector.numpy().astype("<f4").tobytes()


def digest_of(feature_names: Sequence[str]) -> Tensor:
    """A hash of the features' names that travels among the weights: uint8 [32]."""
    return torch.tensor(list(hashlib.sha256(json.dumps(list(feature_names)).encode()).digest()), dtype=torch.uint8)
