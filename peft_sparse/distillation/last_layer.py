"""What a model's last layer gives, before the norm that many models have behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .attention import Hooked, inner_model
from .student import stack_of


class LastLayer(Hooked):
    """Keeps the output of a model's last layer while a `with` block lasts.

    The last of a model's `hidden_states` is behind the final norm (Llama, ModernBERT), all others are before any: where
    a last layer is compared with one in the middle, it has to be this.

    Args:
        model: a model of transformers, maybe with adapters.
        wanted: whether to keep it.

    Attributes:
        output: [B, T, h]; None if there was no forward, or it is not wanted.
    """

    def __init__(self, model: nn.Module, *, wanted: bool) -> None:
        super().__init__()
        self._model, self._wanted = inner_model(model), wanted
        self.output: Tensor | None = None

    def __enter__(self) -> LastLayer:
        if self._wanted:
            path, depth = stack_of(self._model)
            last = self._model.get_submodule(f"{path}.{depth - 1}")
            self._handles = [last.register_forward_hook(self._keep)]
        return self

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.output is None:
            self.output = output[0] if isinstance(output, tuple) else output
