"""Base class of all tuners here: how PEFT drives them, and how an adapter's tensors are named in its file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer
from ...checkpoints.push import keep_card_when_pushing
from ...core.names import unwrapped, without_adapter
from ...errors import ConfigError
from .adapter_config import outer_carrier_of
from .adapter_names import known_list, known_names
from .adding import adding
from .base_model import KnownModules, iter_tuned
from .combining import Combined, add_combined, check_names, choose_head, inherited
from .events import ON_STACK, announce
from .heads_in_files import check_shapes
from .keys import own_state, to_model_keys, warn_if_not_finite
from .made_for_file import Receipt, cast_anew, receiving
from .mixed_batches import give_names, names_by_module
from .stacked_heads import check_rows_to_merge, delete_heads, set_adapters, set_heads_to_merge
from .target_checks import refuse_stacked_types
from .token_rows import check_token_rows, keep_biases


class AdapterTuner(BaseTuner):
    """How the tuners of this library are driven by PEFT, and how an adapter's tensors are named in its file.

    A tuner type says what a config means on a model (`_plan`), makes its layers (`_tuned`), checks its files
    (`_receive`), and says what the sum of adapters is (`_combine`).
    """

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # Whether the layers take `adapter_names` as an argument of their forward, as heads do.
    names_in_forward: ClassVar[bool] = True

    # ---- injection -------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **options: Any) -> None:
        if isinstance(outer_carrier_of(model), PeftModel):
            raise ConfigError(
                "the model is a PeftModel already. Its add_adapter(name, config) and load_adapter(path, name) add one "
                "more adapter. To start over, give PEFT the base model: model.unload() returns it without adapters."
            )
        # A model that has adapters already shares their configs with its new tuner, and keeps them if that fails.
        held = getattr(model, "peft_config", None)
        before = dict(held) if isinstance(held, dict) else None
        try:
            super().__init__(model, peft_config, adapter_name, **options)
        except BaseException:
            if before is not None:
                held.clear()
                held.update(before)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model (called by PEFT).

        All that can be refused is refused before the first module is touched; what fails later is undone.

        Raises:
            ConfigError: the request cannot be met on this model.
        """
        requested = self.peft_config[adapter_name]
        with adding(self, model, adapter_name) as config:
            check_token_rows(config, model, self._plan(config, model, adapter_name, state_dict))
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            keep_biases(model)
            self._complete(config, model, adapter_name, requested)

    def _plan(
        self, config: Any, model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor] | None
    ) -> Collection[str]:
        """Resolve the tuner's copy of a config, in place, and say where the adapter goes; the model stays untouched.

        Returns:
            paths of the modules that get a part of the adapter.

        Raises:
            ConfigError: the request cannot be met on this model.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what a config means on a model")

    def _complete(self, config: Any, model: nn.Module, adapter_name: str, requested: PeftConfig) -> None:
        """What is left to do when the layers of an adapter are in place; `requested` is the config as it was given."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self._tuned(peft_config, adapter_name, target, unwrapped(current_key), parent)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _tuned(self, config: Any, adapter_name: str, target: nn.Module, path: str, parent: nn.Module) -> nn.Module:
        """The layer for a module, with a new adapter in it: a new layer around it, or `target` if that is one already.

        Args:
            config: the adapter's own copy of its config.
            adapter_name: its name.
            target: the module, or the layer that is around it already.
            path: its path in the base model.
            parent: the module that holds it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how an adapter comes into a layer")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight`, which a dropout, a feed-forward or a head of several layers (XLM-R's
        # classifier) does not have, and moves an adapter on the meta device if its layer is one of bitsandbytes' 8-bit
        # ones. Ours lie where they belong.
        setattr(parent, child_name, new_module)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        # PEFT warns that nothing ties the adapters; here the rule is fixed: the output matrix keeps the base weights,
        # and an invertible adapter is undone before it.
        return

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with cast_anew(self, self.peft_config[adapter_name], adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def tuned_layers(self) -> list[Any]:
        """The layers of this tuner type in the model."""
        return list(self.around.of_kind(self.tuner_layer_cls))

    @property
    def around(self) -> KnownModules:
        """The modules of the model around its adapters, as they are now."""
        known = vars(self).get("_known_modules")
        if known is None:
            known = vars(self)["_known_modules"] = KnownModules()
        return known.see(self.model)

    def unmerge_layers(self, layers: list[Any]) -> None:
        """Restore the base weights of some layers, of any tuner."""
        for layer in layers:
            layer.unmerge()

    def release(self, layer: Any) -> None:
        """Take a layer that leaves the model out of the modules around it."""

    # ---- switching -------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; of several with heads for the same module the last one's head acts."""
        names = known_names(adapter_name, self.peft_config) or []
        set_adapters(self, adapter_name if isinstance(adapter_name, str) else names, inference_mode=inference_mode)
        # Not where all were loaded to be used: trainers are slow to import.
        active = self.active_adapters
        if len(active) > 1 and not all(self.peft_config[name].inference_mode for name in active):
            announce(ON_STACK)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's method, for adapters that the model has."""
        super().set_requires_grad(known_names(adapter_names, self.peft_config), requires_grad)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's method; adapters that are named bring their heads along, and must be there."""
        adapter_names = known_list(adapter_names, self.peft_config)
        check_rows_to_merge(self, adapter_names or [])
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        refuse_stacked_types(self.model, self.around.of_kind(BaseTunerLayer))
        layers = dict(iter_tuned(self.model, self.tuner_layer_cls))
        self._begin_unloading(layers, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)
        if merge and adapter_names is not None:
            # PEFT leaves the head of the active adapter, and looks for rows of tokens that an adapter may not have.
            set_heads_to_merge(self, adapter_names)
            for layer in self.tuned_layers():
                layer.set_adapter(adapter_names, inference_mode=True)
            adapter_names = None
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        self._end_unloading(model, layers, merge=merge)
        return model

    def _begin_unloading(
        self, layers: Mapping[str, Any], *, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> None:
        """Refuse what cannot be unloaded or merged for good, and make the layers ready for it.

        Args:
            layers: {path in the base model: layer} of this tuner type.
            merge, safe_merge, adapter_names: as PEFT's.
        """

    def _end_unloading(self, model: nn.Module, layers: Mapping[str, Any], *, merge: bool) -> None:
        """Clear up after the layers have left the model, which is the base model again."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it alone was active, the first that is left takes over."""
        left = [name for name in self.active_adapters if name != adapter_name]
        delete_heads(self, adapter_name, left)
        super().delete_adapter(adapter_name)
        left = left or list(self.peft_config)[:1]
        # PEFT lets every layer fall back to the first adapter that it has itself: layers would end on different ones,
        # and the model on none if its first layer has none.
        if any(layer.active_adapters != left for layer in self.tuned_layers()):
            self.set_adapter(left)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per example, to every layer for the length of one forward or generate call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        named = dict(names_by_module(self, list(adapter_names), args, kwargs, self.tuner_layer_cls))
        layers = {module: names for module, names in named.items() if isinstance(module, self.tuner_layer_cls)}
        if any(layer.disable_adapters for layer in layers):
            raise ValueError(
                "adapter_names cannot be given while adapters are disabled: call enable_adapter_layers() first."
            )
        taking = named if self.names_in_forward else {m: names for m, names in named.items() if m not in layers}
        with ExitStack() as undo:
            for module, names in taking.items():
                undo.callback(give_names(module, names).remove)
            for layer, names in layers.items():
                undo.callback(setattr, layer, "row_names", None)
                layer.row_names = names
            yield

    # ---- composition -----------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        head_from: str | None = None,
    ) -> None:
        """Make a new adapter out of others, which is not activated. See `compose.combined` of the tuner type.

        Args:
            adapters: names of the adapters to combine.
            weights: one finite factor per adapter.
            adapter_name: name of the new adapter.
            combination_type: how; "linear" alone but for sparse adapters.
            head_from: the adapter whose heads (`modules_to_save`) the new one gets; the only one that has any if None.

        Raises:
            ConfigError: an unknown or missing name, a name that is taken, adapters that cannot be combined so, or heads
                in several of them without `head_from`. The model is left as it was.
        """
        self._add_combined(adapters, weights, adapter_name, head_from=head_from, combination_type=combination_type)

    def _add_combined(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *, head_from: str | None, **how: Any
    ) -> None:
        names, factors = list(adapters), list(weights)
        check_names(self, names, factors, adapter_name)
        head = choose_head(self, names, head_from)
        add_combined(self, self._combine(names, factors, inherited(self, names, head), **how), adapter_name, head=head)

    def _combine(self, adapters: list[str], weights: list[float], fields: dict[str, Any], **how: Any) -> Combined:
        """The sum of adapters; `fields` are those of its config that the combined ones have already."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the sum of adapters is")

    # ---- files -----------------------------------------------------------------------------------

    # What is undone if the model does not take in the file that is being loaded.
    undo_file: Receipt | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch's method. The first moment at which PEFT has said which tensors it really loads, and the last before it
        # does: with `ignore_mismatched_sizes` it leaves those of another shape out.
        undo, self.undo_file = self.undo_file or Receipt(), None
        with undo:
            check_shapes(self, state_dict, prefix)
            undo.pop_all()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """transformers' method, which a PeftModel is asked for as well: of embeddings that no adapter tunes or copies.

        Raises:
            ConfigError: an adapter does; transformers would find a layer of another class in the embedding's place.
        """
        for path, module in self.model.named_modules():
            is_vocabulary = module in (self.model.get_input_embeddings(), self.model.get_output_embeddings())
            if is_vocabulary and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                raise ConfigError(
                    f"{path} is tuned or trained whole by an adapter, and cannot be resized around it. Resize the base "
                    "model before the adapter is added; for one that is trained already: save it, take the base model "
                    "from unload(), resize that, and load the adapter onto it."
                )
        return self.model.resize_token_embeddings(*args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        own = own_state(model, adapter_name, state_dict, cls.tuner_layer_cls)
        warn_if_not_finite(own, adapter_name)
        config.saved_as = adapter_name
        keep_card_when_pushing(model)
        return cls._for_file(model, config, adapter_name, own, state_dict)

    @classmethod
    def _for_file(
        cls, model: nn.Module, config: Any, adapter_name: str, own: dict[str, Tensor], whole: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """An adapter's own tensors as its file holds them; its heads are in `whole`, the model's state dict."""
        return own

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        with receiving(model, config, adapter_name) as undo:
            return cls._receive(model, config, adapter_name, state_dict, undo)

    @classmethod
    def _receive(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], undo: Receipt
    ) -> dict[str, Tensor]:
        """Check a file's tensors as a whole, before one is loaded, and make the adapter ready for them.

        Args:
            model: whatever carries the adapter.
            config: the model's own copy of its config.
            adapter_name: its name.
            state_dict: the tensors by key, as in the file but for heads.
            undo: takes callbacks that undo what is done to the adapter here, in case the model does not take them.

        Returns:
            the tensors under the model's own keys.

        Raises:
            FormatError: the file is damaged or does not fit the model.
        """
        return to_model_keys(model, adapter_name, state_dict, cls.tuner_layer_cls)
