"""Optimizer state that keeps its own dtype when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .other_states import refuse_other

if TYPE_CHECKING:
    from torch.optim import Optimizer

    _Base = Optimizer
else:
    _Base = object


class Float32StateMixin(_Base):
    """For optimizers whose state is float32 whatever the dtype of the parameters.

    `torch.optim.Optimizer.load_state_dict` casts state to the dtype of the parameter. For bfloat16 values that rounds
    moments and ages: 257 is no bfloat16 number.

    Attributes:
        own_state: names of the state that every updated parameter has.
        host_state: names of state that stays on the CPU while it is one number.
    """

    own_state: tuple[str, ...]
    host_state: tuple[str, ...] = ()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, tensors in the dtype in which they were saved, but floating point at least in float32.

        Raises:
            ConfigError: another optimizer wrote it; nothing has changed.
        """
        loaded: dict[str, Any] = {}
        parameters: list[Tensor] = []

        def remember(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            final = self._understood(final)
            loaded.update(final)
            parameters.extend(p for group in self.param_groups for p in group["params"])
            return final

        # Registered last, so that it sees what the hooks of others made of the state, and of the groups.
        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        for saved_id, p in zip(ids, parameters, strict=True):
            saved = loaded["state"].get(saved_id, {})
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    on_host = key in self.host_state and value.dim() == 0
                    self.state[p][key] = value.detach().to(
                        device="cpu" if on_host else p.device,
                        dtype=torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else None,
                        copy=True,
                    )

    def _understood(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A saved state as this optimizer has it.

        Raises:
            ConfigError: it is another optimizer's.
        """
        refuse_other(self, state_dict, keeps=self.own_state)
        return state_dict
