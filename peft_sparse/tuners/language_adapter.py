"""An adapter for a language that has none, mixed from those of languages like it."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel

from ..errors import ConfigError
from ..typology import Typology, load_typology


def add_language_adapter(
    model: PeftModel,
    language: str,
    adapters: Mapping[str, str],
    *,
    adapter_name: str | None = None,
    typology: Typology | None = None,
    n: int | None = None,
    temperature: float = 0.1,
) -> dict[str, float]:
    """Add an adapter for a language that has none: the mean of others' adapters, weighted by typological likeness.

    The new adapter is one like any other, by `add_weighted_adapter`; it is not activated. Of sparse adapters it holds
    the union of the supports, so give `n` if there are many.

    Args:
        model: holds the adapters.
        language: the language that has none.
        adapters: {language: name of its adapter in the model}.
        adapter_name: of the new adapter; the language's code if None.
        typology: where vectors come from; `load_typology()` if None.
        n, temperature: of `Typology.mixing_weights`.

    Returns:
        {language: weight}, nearest first, with sum 1.

    Raises:
        ConfigError: an unknown language, one that has an adapter among `adapters`, or names that the model refuses.

    Source: TIPA (Accou and Poelman 2026, arXiv:2601.16629) mixes MAD-X adapters so; see `Typology.mixing_weights`.
    """
    typology = load_typology() if typology is None else typology
    own = typology.resolve(language)
    same = [source for source in adapters if typology.resolve(source) == own]
    if same:
        raise ConfigError(
            f"language {language!r} has an adapter of its own ({adapters[same[0]]!r}): use that one, or leave it out "
            "of adapters"
        )
    weights = typology.mixing_weights(language, adapters, n=n, temperature=temperature)
    model.add_weighted_adapter(
        [adapters[source] for source in weights],
        list(weights.values()),
        language if adapter_name is None else adapter_name,
        combination_type="linear",
    )
    return weights


# What it was called before.
for_language = add_language_adapter
