"""`Typology`: one vector of typological features per language, found by any of the language's usual codes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FormatError
from .codes import is_glottocode, spellings, stand_ins
from .files import Table, read_file, read_glottocodes, read_package
from .saved import SavedTypology

logger = logging.getLogger(__name__)

DEFAULT_FEATURES = ("syntax_knn", "phonology_knn", "inventory_knn")


def load_typology(
    path: str | Path | None = None,
    *,
    features: Sequence[str] = DEFAULT_FEATURES,
    glottocodes: str | Path | None = None,
) -> Typology:
    """Read typological vectors; by default URIEL's 289 features of 7,970 languages from an installed lang2vec.

    The data are CC BY-SA 4.0 and therefore not a part of this package. lang2vec is not imported, only its files are
    read. The k-nearest-neighbour sets have no missing values; where others have, see `Typology`.

    Args:
        path: a data file instead: `.npz` as in lang2vec, `.json` ({"features": {set: [names]}, "vectors": {code: {set:
            [values]}}}), or `.csv` / `.tsv` (a header; then code, value, value, ... for each language); or a folder
            with lang2vec's data files.
        features: sets of features by lang2vec's names, in this order: "syntax", "phonology" or "inventory", and "_knn",
            "_average" or a source such as "_wals". Of a `.csv` or `.tsv` file all columns are taken.
        glottocodes: a CSV file with Glottocodes and ISO 639-3 codes (Glottolog's `languoid.csv` or `languages.csv`), to
            look languages up by Glottocode; an installed URIEL+ is found without.

    Raises:
        ConfigError: no lang2vec, a set that is not there, an unknown kind of file.
        FormatError: a file that is damaged, holds pickled objects, or is not what its ending says.

    Cost: a tenth of a second and 9 MB for lang2vec's 7,970 languages.
    Source: Littell et al. 2017 (URIEL); thesis 3.3.1 for the choice of sets.
    """
    if not features or isinstance(features, str):
        raise ConfigError(f"features must be a sequence of names of feature sets, got {features!r}")
    table = read_package(features) if path is None else read_file(Path(path), features)
    return Typology.from_table(table, glottocodes=read_glottocodes(Path(glottocodes) if glottocodes else None))


@dataclass(frozen=True, eq=False)
class Typology:
    """Vectors of languages. Made by `load_typology`, or of vectors of your own by `from_vectors`.

    A language is asked for by its code in the table, ISO 639-1, 639-2 or 639-3 (a script or region behind it is left
    out, as in "eng_Latn"), or its Glottocode. Codes of groups that data sets use as if they were languages, such as
    AmericasNLI's "nah" and "oto", are answered by a member, and `resolve` says by which. What a table has under the
    very code goes first.

    A missing value is the mean of the feature over the languages for which it is known (0 if there is none); `missing`
    names them, and a warning counts them once. A language of which nothing is known is left out.

    Attributes:
        languages: codes [L], as in the source.
        feature_names: names [d].
        values: [L, d] float32, finite.
        source: where the vectors come from: a package or the name of a file.
        version: of the source, if it has one.
        missing: {language: names of its features that were missing}.
        glottocodes: {Glottocode: ISO 639-3}, as far as known.
    """

    languages: tuple[str, ...]
    feature_names: tuple[str, ...]
    values: Tensor
    source: str
    version: str | None = None
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    glottocodes: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_vectors(
        cls,
        vectors: Mapping[str, Sequence[float] | np.ndarray | Tensor],
        *,
        feature_names: Sequence[str] | None = None,
        source: str = "own vectors",
        version: str | None = None,
    ) -> Typology:
        """Vectors of your own.

        Args:
            vectors: {code: vector [d]}; NaN where a value is missing.
            feature_names: names [d], all different; "0", "1", ... if None.
            source, version: how errors and saved adapters name them.

        Raises:
            ConfigError: no vectors, vectors of different lengths, names that are not one per feature.
        """
        rows = [torch.as_tensor(vector).detach().cpu().float().flatten().numpy() for vector in vectors.values()]
        widths = sorted({len(row) for row in rows})
        if len(widths) != 1 or widths == [0]:
            raise ConfigError(f"vectors must be one or more and of one length, got lengths {widths}")
        names = tuple(feature_names) if feature_names is not None else tuple(str(i) for i in range(widths[0]))
        return cls.from_table(Table(tuple(vectors), names, np.stack(rows), source, version))

    @classmethod
    def from_table(cls, table: Table, *, glottocodes: Mapping[str, str] | None = None) -> Typology:
        """What `load_typology` and `from_vectors` end in: checks, and missing values filled."""
        _check(table)
        values, known = table.values.astype(np.float64), ~np.isnan(table.values)
        kept = known.any(axis=1)
        if not kept.all():
            logger.info("%s: %d languages without any known feature are left out", table.source, (~kept).sum())
        languages = tuple(code for code, keep in zip(table.languages, kept, strict=True) if keep)
        values, known = values[kept], known[kept]
        means = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        missing = {
            code: tuple(name for name, is_known in zip(table.feature_names, row, strict=True) if not is_known)
            for code, row in zip(languages, known, strict=True)
            if not row.all()
        }
        if missing:
            logger.warning(
                "%s: %d of %d values are missing, in %d of %d languages; they are set to the feature's mean",
                *(table.source, (~known).sum(), known.size, len(missing), len(languages)),
            )
        filled = (
            torch.from_numpy(np.where(known, values, means)).float() + 0.0
        )  # no negative zeros: the digest sees bits
        return cls(
            languages, table.feature_names, filled, table.source, table.version, missing, dict(glottocodes or {})
        )

    def __len__(self) -> int:
        return len(self.languages)

    def __contains__(self, code: object) -> bool:
        return isinstance(code, str) and self._find(code) is not None

    def resolve(self, code: str) -> str:
        """The code in `languages` that answers for a language.

        Raises:
            ConfigError: there is none; the error lists codes that are spelt alike.
        """
        found = self._find(code)
        if found is None:
            raise ConfigError(self._unknown(code))
        return found

    def vector(self, code: str) -> Tensor:
        """The vector [d] float32 of a language, a copy.

        Raises:
            ConfigError: the language is not in the table.
        """
        return self.values[self._rows[self.resolve(code)]].clone()

    def vectors(self, codes: Iterable[str]) -> Tensor:
        """The vectors [n, d] float32 of several languages, in their order."""
        return self.values[[self._rows[self.resolve(code)] for code in codes]]

    def nearest_languages(self, code: str, n: int = 5, among: Iterable[str] | None = None) -> list[tuple[str, float]]:
        """The languages most like one, by cosine distance, nearest first; ties in alphabetical order.

        The cosine is what the thesis measures nearness by (3.4.1): for 0/1 features it counts what two languages both
        have against what either has, so that two languages are not alike for all the sounds that both lack.

        Args:
            code: the language.
            n: how many at most.
            among: codes to choose from; all other languages of the table if None.

        Returns:
            [(code, 1 - cosine)], codes as in `among` or in the table; the distance is 1 to a vector of zeros.

        Raises:
            ConfigError: `code` or one of `among` is not in the table, or n < 1.
        """
        if n < 1:
            raise ConfigError(f"n must be 1 or more, got {n}")
        own = self.resolve(code)
        others = [other for other in self.languages if other != own] if among is None else list(dict.fromkeys(among))
        target = self.values[self._rows[own]].double()
        candidates = self.vectors(others).double()
        cosines = torch.nn.functional.cosine_similarity(candidates, target[None], dim=1)
        # Rounded so that equal vectors are at distance 0 and equal distances are ties, whatever the order of the sums.
        distances = [max(0.0, round(1 - cosine, 12)) for cosine in cosines.tolist()]
        return sorted(zip(others, distances, strict=True), key=lambda pair: (pair[1], pair[0]))[:n]

    def mixing_weights(
        self, code: str, sources: Iterable[str], *, n: int | None = None, temperature: float = 0.1
    ) -> dict[str, float]:
        """How much of each source language's adapter to mix for a language that has none.

        Args:
            code: the language.
            sources: languages with adapters.
            n: take only the n nearest of them; all if None.
            temperature: > 0; weights are softmax(cosine / temperature), so a small one takes little but the nearest.

        Returns:
            {source: weight}, nearest first; positive, with sum 1.

        Raises:
            ConfigError: an unknown language, no sources, n < 1 or temperature <= 0.

        Source: the idea of a typology-weighted mean of adapters is TIPA's (Accou and Poelman 2026, arXiv:2601.16629);
        the cosine over these features and the softmax are ours.
        """
        chosen = list(dict.fromkeys(sources))
        if not chosen:
            raise ConfigError("sources must name at least one language that has an adapter, got none")
        if not temperature > 0:
            raise ConfigError(f"temperature must be > 0, got {temperature}")
        nearest = self.nearest_languages(code, len(chosen) if n is None else n, among=chosen)
        distances = torch.tensor([distance for _, distance in nearest], dtype=torch.float64)
        weights = torch.softmax(-distances / temperature, dim=0).tolist()
        return {source: weight for (source, _), weight in zip(nearest, weights, strict=True)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the features' names, the codes and the values, whatever the order of the languages."""
        digest = hashlib.sha256(b"peft_sparse typology 1\n")
        digest.update("\n".join([*self.feature_names, "", ""]).encode())
        values = self.values.numpy().astype("<f4")
        for code in sorted(self.languages):
            digest.update(f"{code}\n".encode() + values[self._rows[code]].tobytes())
        return digest.hexdigest()

    def to_dict(self, *, languages: Iterable[str] = ()) -> dict[str, Any]:
        """A form for JSON, to be saved with an adapter: names, source, version, digest, and the vectors of `languages`.

        Args:
            languages: those that an adapter was trained on; with them it can be used again without the data, and
                `require_same` can tell whether other data say the same of them.
        """
        codes = sorted({self.resolve(code) for code in languages})
        vectors = {code: self.vector(code) for code in codes}
        return SavedTypology(self.source, self.version, self.digest, self.feature_names, vectors).to_dict()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Typology:
        """The languages that `to_dict` kept. The digest of the result is theirs, not that of the whole table.

        Raises:
            FormatError: not what `to_dict` gives, or without vectors.
        """
        kept = SavedTypology.from_dict(saved)
        if not kept.vectors:
            raise FormatError("the saved typology keeps no vectors: give the data that it was made of")
        return cls.from_vectors(
            kept.vectors, feature_names=kept.feature_names, source=kept.source, version=kept.version
        )

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Refuse to stand in for the typology that `to_dict` describes if it says something else.

        The features must be the same, in the same order. If vectors were saved, those are compared, whatever code of a
        language they were asked for by, so that a file with some of the languages serves as well as the whole; it is
        told if it has none of them. Without saved vectors the digest is compared.

        Raises:
            ConfigError: it differs; the error says in what.
            FormatError: not what `to_dict` gives.
        """
        theirs = SavedTypology.from_dict(saved)
        origin = _origin(theirs)
        if self.feature_names != theirs.feature_names:
            raise ConfigError(
                f"the features must be those of {origin} ({len(theirs.feature_names)}), in their order; "
                f"{_origin(self)} has {_first_difference(self.feature_names, theirs.feature_names)}"
            )
        # A language that another stands for here may have been in the whole table itself.
        shared = [code for code in theirs.vectors if self._spelt(code) is not None]
        changed = [code for code in shared if not torch.equal(self.vector(code), theirs.vectors[code])]
        if changed:
            raise ConfigError(
                f"the vectors of {changed[:5]} ({len(changed)} of {len(shared)} languages) are not those of {origin}: "
                f"{_origin(self)} is another version of the data, and adapters generated from it would be others"
            )
        if theirs.vectors and not shared and self.digest != theirs.digest:
            logger.warning(
                "%s has none of the languages %s, so nothing shows whether it is %s, whose vectors the adapter was "
                "trained on: give a typology that has one of them as well",
                _origin(self), list(theirs.vectors)[:5], origin,
            )  # fmt: skip
        if not theirs.vectors and self.digest != theirs.digest:
            raise ConfigError(
                f"the vectors are not those of {origin}: {_origin(self)} has the digest {self.digest[:12]}, not "
                f"{theirs.digest[:12]}. Give the data that the adapter was trained with"
            )

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {code: row for row, code in enumerate(self.languages)}

    def _find(self, code: str) -> str | None:
        found = self._spelt(code)
        if found is not None:
            return found
        for other in stand_ins(self._plain(code)):
            if other in self._rows:
                logger.info("%s has no %s; %s stands for it", self.source, code, other)
                return other
        return None

    def _spelt(self, code: str) -> str | None:
        """The code of the language itself, if it is here under any of its codes."""
        return next((other for other in (code, *spellings(self._plain(code))) if other in self._rows), None)

    def _plain(self, code: str) -> str:
        """A Glottocode's ISO code; any other code as it is."""
        return self.glottocodes.get(code.strip().lower(), code)

    def _unknown(self, code: str) -> str:
        text = f"language {code!r} is not among the {len(self)} of {_origin(self)}"
        if is_glottocode(code.strip().lower()) and not self.glottocodes:
            return (
                f"{text}, and no table of Glottocodes is at hand: pip install urielplus, or give "
                "load_typology(glottocodes=...) a CSV file of Glottolog's; or use the ISO 639-3 code"
            )
        near = get_close_matches(code.strip().lower(), [*self.languages, *self.glottocodes], n=8, cutoff=0.5)
        return f"{text}. {f'Spelt alike: {sorted(near)}. ' if near else ''}Give its ISO 639-1, ISO 639-3 or Glottocode"


def _check(table: Table) -> None:
    for field_name, names in (("languages", table.languages), ("feature_names", table.feature_names)):
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if not names or twice:
            raise ConfigError(
                f"{field_name} of {table.source} must be one or more and all different, got {twice} twice"
            )
    width = table.values.shape[1]
    if len(table.feature_names) != width:
        raise ConfigError(f"feature_names must be one per feature, got {len(table.feature_names)} names for {width}")
    infinite = [table.languages[row] for row in np.flatnonzero(np.isinf(table.values).any(axis=1))]
    if infinite:
        raise ConfigError(f"vectors must be finite, or NaN where a value is missing; those of {infinite[:5]} are not")


def _origin(typology: Typology | SavedTypology) -> str:
    return f"{typology.source} {typology.version or ''}".strip()


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    for place, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other:
            return f"{own!r} in place {place}, not {other!r}"
    return f"{len(ours)} features"
