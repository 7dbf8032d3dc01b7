"""What a hypernetwork generated: an ordinary bottleneck adapter that is in no model yet."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

from peft import PeftModel, get_peft_model
from torch import nn

from ...checkpoints.output import save_adapter
from ...core.names import PREFIX
from ...errors import ConfigError
from ..bottleneck.adapter import BottleneckWeights
from ..bottleneck.config import BOTTLENECK, BottleneckConfig
from ..bottleneck.iteration import set_bottleneck_weights
from ..bottleneck.layer import ADAPTERS
from ..common.adapter_config import carrier_of
from ..common.removal import discard


@dataclass(frozen=True)
class GeneratedAdapter:
    """A bottleneck adapter for one language, independent of the hypernetwork that generated it.

    Attributes:
        language: the language's code.
        name: the name that it gets in a model.
        config: its config.
        weights: {path of the site in the base model: tensors}; the biases are zeros.
    """

    language: str
    name: str
    config: BottleneckConfig
    weights: dict[str, BottleneckWeights]

    def add_to(self, model: nn.Module) -> PeftModel:
        """Add it to a model, under its name.

        Args:
            model: a base model, or a `PeftModel` with bottleneck adapters, which gets one more.

        Returns:
            the `PeftModel`. The adapter is active if it is the first, and can be trained.

        Raises:
            ConfigError: the model holds another tuner type, or has other sites or widths. It is as it was then.
        """
        config = copy.deepcopy(self.config)
        carrier = carrier_of(model)
        if not isinstance(carrier, PeftModel):
            model = get_peft_model(model, config, adapter_name=self.name)
        else:
            model = carrier
            kind = next(iter(model.peft_config.values())).peft_type
            if kind != BOTTLENECK:
                raise ConfigError(
                    "a generated adapter is of type BOTTLENECK and a PeftModel holds one type, this one "
                    f"{kind.value}. Add it to a copy of the base model."
                )
            if self.name in model.peft_config:
                raise ConfigError(
                    f"adapter_name {self.name!r} is taken; the model has {sorted(model.peft_config)}. Generate it "
                    "under another name."
                )
            model.add_adapter(self.name, config)
        try:
            set_bottleneck_weights(model, self.weights, self.name)
        except ConfigError:
            discard(model, self.name)
            raise
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write it as PEFT writes an adapter; `PeftModel.from_pretrained(base, folder)` loads it.

        Args:
            folder: made if it is not there; an adapter in it is replaced.

        Raises:
            ConfigError: see `files.AtomicFolder`.
        """
        tensors = {
            f"{PREFIX}{path}.{ADAPTERS}.{field.replace('_', '.')}": tensor.cpu().contiguous()
            for path, weights in self.weights.items()
            for field, tensor in weights._asdict().items()
        }
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        save_adapter(folder, tensors, config, overwrite=True)
