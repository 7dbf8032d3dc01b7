"""What the tuners of this library share in how PEFT drives them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...checkpoints.push import keep_card_when_pushing
from ...core.names import without_adapter
from ...errors import ConfigError, FormatError
from .adapter_names import check_adapter_name
from .files import discard
from .heads_in_files import check_heads, check_shapes, with_heads
from .keys import own_state, to_model_keys, warn_if_not_finite
from .layer import WeightLayer
from .mixed_batches import give_names, names_by_module
from .stacked_heads import delete_heads, has_several_heads, set_adapters


@contextmanager
def adding(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[Any]:
    """Give an adapter that PEFT adds to a tuner a config of its own, and forget the adapter if it is refused."""
    is_first = len(tuner.peft_config) == 1
    named = model.named_parameters(remove_duplicate=False)
    before = [(name, parameter, parameter.requires_grad) for name, parameter in named]
    try:
        config = tuner.peft_config[adapter_name] = copy.deepcopy(tuner.peft_config[adapter_name])
        config.modules_to_save = with_heads(config)
        check_adapter_name(adapter_name, tuner.peft_config.values())
        check_heads(config, model, adapter_name)
        if is_first:
            # What a refused file gives back: PEFT freezes the base model before it opens the file.
            tuner.trainable_before = {name for name, _, requires_grad in before if requires_grad}
        tuner.awaiting = adapter_name if config.awaits_file else None
        yield config
    except ValueError:
        # PEFT has entered the name already; without an adapter behind it the model would be unusable.
        if len(tuner.peft_config) > 1:
            del tuner.peft_config[adapter_name]
        raise
    if not is_first:
        # PEFT restores what trains and what does not but for parameters whose paths hold the new adapter's name.
        for _, parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


class AdapterTuner(BaseTuner):
    """How the tuners of this library name an adapter's tensors in its file, and find them again."""

    # The adapter that was added for a file and has not been given its tensors yet.
    awaiting: str | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch's method. The first moment at which PEFT has said which tensors it really loads, and the last before it
        # does: with `ignore_mismatched_sizes` it leaves those of another shape out.
        awaiting, self.awaiting = self.awaiting, None
        try:
            check_shapes(self, state_dict, prefix)
        except FormatError:
            if awaiting is not None:
                discard(self, awaiting)
            raise
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
        return own

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return to_model_keys(model, adapter_name, state_dict, cls.tuner_layer_cls)


class WeightTuner(AdapterTuner):
    """Base class of tuners whose layers are `WeightLayer`s, and whose configs are copies of the user's."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # Paths of the modules that the adapter being added targets.
    _targets: Collection[str]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # The targets are known; PEFT needs some value to iterate over and to name in its errors.
        if peft_config.target_modules is None:
            peft_config.target_modules = set(self._targets)
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight`, which a head of several layers (XLM-R's classifier) does not have, and moves
        # an adapter on the meta device if its layer is one of bitsandbytes' 8-bit ones. Ours lie where they belong.
        setattr(parent, child_name, new_module)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        # PEFT warns that nothing ties the adapters; here the rule is fixed: the output matrix keeps the base weights.
        return

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several; of several with heads for the same module the last one's head acts."""
        if has_several_heads(self, adapter_name):
            set_adapters(self, adapter_name, inference_mode=inference_mode)
        else:
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it alone was active, the first that is left takes over."""
        left = [name for name in self.active_adapters if name != adapter_name]
        delete_heads(self, adapter_name, left)
        super().delete_adapter(adapter_name)
        left = left or list(self.peft_config)[:1]
        # PEFT lets every layer fall back to the first adapter that it has itself: layers would end on different ones,
        # and the model on none if its first layer has none.
        if any(layer.active_adapters != left for layer in self._layers()):
            self.set_adapter(left)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights until `unmerge_adapter`, which restores them bit for bit.

        Args:
            adapter_names: the adapters to merge; the active ones if None.
            safe_merge: refuse values that are not finite, before any layer is touched. Finite ones that would become
                infinite in the base weights' dtype are always refused.
        """
        self._check_merged(adapter_names, safe_merge=safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _layers(self) -> list[WeightLayer]:
        return [module for module in self.model.modules() if isinstance(module, WeightLayer)]

    def _check_merged(self, adapter_names: list[str] | None, *, safe_merge: bool) -> None:
        for layer in self._layers():
            check = layer.check_finite if safe_merge else layer.check_range
            check(adapter_names if adapter_names is not None else layer.active_adapters)

    def _check_unloading(self, *, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Refuse to merge for good what cannot be, before anything is touched."""
        if merge:
            self._check_merge_allowed()
            self._check_merged(adapter_names, safe_merge=safe_merge)

    def _as_before(self, model: nn.Module) -> None:
        """Let parameters of an unloaded model train or not as they did before PEFT froze them."""
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in self.trainable_before)

    def _restore(self) -> None:
        """Take whatever is merged or written out of the base weights."""
        for layer in self._layers():
            layer.merged_adapters.clear()
            layer.restore()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one per example, to every layer for the length of one forward or generate call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        named = dict(names_by_module(self, list(adapter_names), kwargs, WeightLayer))
        handles = [give_names(module, names) for module, names in named.items()]
        layers = {module: names for module, names in named.items() if isinstance(module, WeightLayer)}
        for layer, names in layers.items():
            layer.row_names = names
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer.row_names = None
