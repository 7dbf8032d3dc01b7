"""MadGModel: the tuner that PEFT drives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from ...errors import ConfigError
from ..bottleneck.config import BottleneckConfig
from ..bottleneck.iteration import iter_layers
from ..bottleneck.layer import BottleneckLayer
from ..bottleneck.model import BottleneckModel
from ..bottleneck.placement import Site
from ..bottleneck.state import unfit
from ..common.adapter_config import refusing_unknown
from ..common.base_model import base_model_of
from ..common.made_for_file import Receipt
from .config import NOT_GENERATED, MadGConfig
from .generated import GeneratedAdapter
from .generator import SiteGenerator, num_generated
from .importance import FeatureImportance, feature_importance
from .languages import LanguageContext, Languages, MadGState, as_languages
from .layer import GENERATORS, MadGLayer
from .saved_typology import as_typology, saved_vectors

logger = logging.getLogger(__name__)


class MadGModel(BottleneckModel):
    """Bottleneck adapters that a hypernetwork generates from the typological vector of the language that is set.

    Args:
        model: the base model.
        peft_config: a `MadGConfig`, or PEFT's dictionary of them.
        adapter_name: name of the first adapter.

    The language of a forward is the one that `set_language` was given, or its own: `model(..., language="quy")`, or
    `language=["quy", "eng", ...]` with one per example, which is how a column of a batch arrives.
    """

    prefix = "mad_g_"
    tuner_layer_cls = MadGLayer

    # ---- injection -------------------------------------------------------------------------------

    def _complete(self, config: MadGConfig, model: nn.Module, adapter_name: str, requested: PeftConfig) -> None:
        self._state.attach(model)
        if self._state.chosen is None:
            self._state.chosen = config.language
        if config.language is not None:
            # Saved with the adapter from the start, and not looked up inside of a trace or of `torch.func`. A language
            # that is not known is the first forward's error, for another one may be set before.
            with suppress(ConfigError):
                self._state.shared[adapter_name].vector(config.language)

    def _find_sites(self, config: MadGConfig, model: nn.Module) -> dict[str, Site]:
        sites = super()._find_sites(config, model)
        widths = sorted({site.width for site in sites.values()})
        if config.layer_dim is not None and len(widths) > 1:
            raise ConfigError(
                f"layer_dim={config.layer_dim}: one generator for all layers needs layers of one width, this model's "
                f"have {widths}. Use layer_dim=None."
            )
        if config.saved_typology is None:
            config.saved_typology = as_typology(config.typology, config.features).to_dict()
        elif config.typology is not None:
            as_typology(config.typology, config.features).require_same(config.saved_typology)
        # A damaged file is refused here, before anything is touched.
        saved_vectors(config.saved_typology)
        self._state = state_of(model) or MadGState()
        return sites

    def _size(self, config: MadGConfig, sites: dict[str, Site]) -> tuple[int, str]:
        generated = [num_generated(config, site.width) for site in sites.values()]
        columns = config.language_dim + (config.layer_dim or 0)
        # With layer embeddings one generator serves all sites.
        total = sum(generated if config.layer_dim is None else generated[:1]) * columns
        return total, "bottleneck_size, language_dim, layer_dim"

    def _new_layer(self, target: nn.Module) -> BottleneckLayer:
        return MadGLayer(target, self._state)

    @classmethod
    def _receive(
        cls, model: nn.Module, config: BottleneckConfig, adapter_name: str, state_dict: dict[str, Tensor], undo: Receipt
    ) -> dict[str, Tensor]:
        remapped = super()._receive(model, config, adapter_name, state_dict, undo)
        for path, site in iter_sites(model, adapter_name):
            if site.shared is not None:
                key = f"{path}.{GENERATORS}.{adapter_name}.shared.features"
                given = next(tensor for name, tensor in remapped.items() if name.endswith(key))
                if not given.cpu().equal(site.shared.features.cpu()):
                    raise unfit(f"the hypernetwork at {path} was trained on other typological features")
        return remapped

    # ---- languages -------------------------------------------------------------------------------

    def set_language(self, language: str | Sequence[str]) -> LanguageContext:
        """Compute with a language from now on. See `set_language`."""
        return set_language(self, language)

    @property
    def language(self) -> Languages | None:
        """The language that is set, or one for each example, or None."""
        return _state(self).chosen

    def set_typology(self, typology: Any, adapter_name: str | None = None) -> None:
        """Where to look for languages whose vectors are not saved with the adapters.

        Args:
            typology: as in `MadGConfig`.
            adapter_name: the adapter; all if None.

        Raises:
            ConfigError: an adapter was trained on another one, or there is no such adapter. Nothing is changed then.
        """
        shared = _state(self).shared
        names = [*shared] if adapter_name is None else [_one_adapter(self, adapter_name)]
        chosen = [shared[name] for name in names]
        found = [as_typology(typology, part.config.features) for part in chosen]
        for part, one in zip(chosen, found, strict=True):
            one.require_same(part.config.saved_typology)
        for part, one in zip(chosen, found, strict=True):
            part.set_typology(one)

    def generate_adapter(
        self, language: str, *, adapter_name: str | None = None, source: str | None = None
    ) -> GeneratedAdapter:
        """An ordinary bottleneck adapter for a language. See `generate_adapter`."""
        return generate_adapter(self, language, adapter_name=adapter_name, source=source)

    def feature_importance(self, adapter_name: str | None = None) -> FeatureImportance:
        """How much each typological feature moves the generated weights. See `importance.feature_importance`."""
        name = _one_adapter(self, adapter_name)
        return feature_importance(dict(iter_sites(self, name)))

    # ---- PEFT's verbs ----------------------------------------------------------------------------

    def _begin_unloading(
        self, layers: Mapping[str, MadGLayer], *, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        if merge:
            self._check_can_build_in(adapter_names)
        super()._begin_unloading(layers, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)

    def _end_unloading(self, model: nn.Module, layers: Mapping[str, MadGLayer], *, merge: bool) -> None:
        super()._end_unloading(model, layers, merge=merge)
        for layer in layers.values():
            layer.state.detach()

    def _check_can_build_in(self, adapter_names: list[str] | None) -> None:
        """Refuse before the first layer is replaced."""
        state = _state(self)
        language = state.current()
        if not isinstance(language, str):
            raise ConfigError(
                f"one language must be set to build its adapter in, got {list(language)}: call "
                'set_language("quy") first.'
            )
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in state.shared:
                state.shared[name].vector(language)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the mean of two hypernetworks generates no mean of their adapters.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "MAD-G adapters cannot be averaged: the weights that they generate are a product of two of their tensors. "
            "Generate bottleneck adapters with generate_adapter() and average those."
        )


def iter_sites(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, SiteGenerator]]:
    """(path of the site in the base model, its generator) of a MAD-G adapter, in the order of the model.

    Raises:
        ConfigError: the model has adapters, and none of this name.
    """
    found = (
        (path, layer.adapters[adapter_name])
        for path, layer in iter_layers(model)
        if isinstance(layer, MadGLayer) and adapter_name in layer.adapters
    )
    return refusing_unknown(found, model, adapter_name)


def _first_layer(model: nn.Module) -> MadGLayer | None:
    return next((module for module in base_model_of(model).modules() if isinstance(module, MadGLayer)), None)


def state_of(model: nn.Module) -> MadGState | None:
    """What the MAD-G layers of a model share, None if it has none."""
    layer = _first_layer(model)
    return None if layer is None else layer.state


def _state(model: nn.Module) -> MadGState:
    state = state_of(model)
    if state is None:
        raise ConfigError("this model has no MAD_G adapter: add one with get_peft_model(model, MadGConfig(...)).")
    return state


def set_language(model: nn.Module, language: str | Sequence[str]) -> LanguageContext:
    """Let the MAD-G adapters of a model compute with a language from now on.

    Args:
        model: a PeftModel, or any model with MAD-G adapters in it.
        language: a code that the typology knows or that is saved with the adapter, or a list with one code for each
            example of the batches to come.

    Returns:
        a context manager: `with set_language(model, "quy"): ...` puts the language before back at the end.

    Raises:
        ConfigError: an active adapter has no vector for it. The language stays the one before.
    """
    state = _state(model)
    languages = as_languages(language)
    look_up_languages(model, [languages] if isinstance(languages, str) else languages)
    before, state.chosen = state.chosen, languages
    return LanguageContext(state, before)


def look_up_languages(model: nn.Module, languages: Iterable[str]) -> None:
    """Have the vectors of languages saved with the active adapters, whether a forward uses them or not.

    Each of several processes sees languages of its own, and the first of them writes the files.

    Args:
        model: a PeftModel, or any model; without MAD-G adapters nothing is done.
        languages: their codes.

    Raises:
        ConfigError: an active adapter has no vector for one.
    """
    layer = _first_layer(model)
    if layer is None:
        return
    codes, shared = dict.fromkeys(languages), layer.state.shared
    for name in layer.active_adapters:
        if name in shared:
            for code in codes:
                shared[name].vector(code)


def generate_adapter(
    model: nn.Module, language: str, *, adapter_name: str | None = None, source: str | None = None
) -> GeneratedAdapter:
    """An ordinary bottleneck adapter for a language, whether there was text of it in training or not.

    It is independent of the hypernetwork: save it, or add it to a model of type `BOTTLENECK` to train it further
    (thesis 3.5.3) or to stack a task adapter on it. The model keeps its own adapters; PEFT lets a model hold one tuner
    type, so it does not get the new one.

    Args:
        model: a PeftModel, or any model with MAD-G adapters in it.
        language: the language's code.
        adapter_name: name of the new adapter; the code if None.
        source: the MAD-G adapter that generates it; the only one, or the active one, if None.

    Heads and rows of trained tokens of the hypernetwork's adapter stay with it; that is told.

    Raises:
        ConfigError: there is no vector for the language.
    """
    name = _one_adapter(model, source)
    shared = _state(model).shared[name]
    shared.vector(language)
    behind = [field for field in NOT_GENERATED if getattr(shared.config, field)]
    if behind:
        logger.warning(
            "the adapter generated for %s has neither heads nor trained tokens of %r (%s), and computes something else "
            "than the model does without them: merge_and_unload() keeps them", language, name, ", ".join(behind),
        )  # fmt: skip
    weights = {path: site.built_in(language).weights for path, site in iter_sites(model, name)}
    return GeneratedAdapter(
        language=language,
        name=adapter_name or language,
        config=shared.config.bottleneck_config(),
        weights={path: type(w)(*(tensor.detach() for tensor in w)) for path, w in weights.items()},
    )


def _one_adapter(model: nn.Module, name: str | None) -> str:
    known = _state(model).shared
    if name is None:
        active = [one for one in _first_layer(model).active_adapters if one in known]
        if len(active) != 1:
            raise ConfigError(f"{len(active)} MAD_G adapters are active: name one of {sorted(known)}.")
        return active[0]
    if name not in known:
        raise ConfigError(f"there is no MAD_G adapter {name!r}; this model has {sorted(known)}.")
    return name
