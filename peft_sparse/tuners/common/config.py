"""Base class of all configs here: their common checks, the stages of training, and how files are written and read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from ...checkpoints.adapter_files import CONFIG_FILE
from ...checkpoints.card import update_card
from ...checkpoints.files import outline_of_weights
from ...checks import check_arguments
from ...errors import FormatError, SparseError
from .field_checks import check_shared_fields
from .heads_in_files import with_heads

_ELSEWHERE = {
    "r": "There is no rank here: equivalent_rank=... tunes as many weights as LoRA of that rank trains.",
    "rank": "There is no rank here: equivalent_rank=... tunes as many weights as LoRA of that rank trains.",
    "lora_alpha": "Weights are tuned themselves, without a scaling; give the strength when adding adapters up.",
    "lora_dropout": "Weights are tuned themselves, without a dropout of their own.",
    "sparsity": "density=... is the share of the weights that are tuned: 1 - sparsity.",
    "k": "num_weights=... is the number of weights to tune.",
    "dtype": "values_dtype=... is the dtype of the trained values.",
    "bias": "target_biases=True tunes the biases of the targeted modules as well.",
}


# What trains in a stage: what the adapter holds, or the targeted parameters of the base model themselves.
ADAPTER, TARGETS = "adapter", "targets"


@dataclass(frozen=True)
class Stage:
    """A part of training in which the same things train: what a plan of memory knows of a method.

    Attributes:
        name: what plans call it.
        trains: `ADAPTER` or `TARGETS`.
        fields: {field of the config: its value in this stage}, where they differ.
        watches_gradients: whether candidates for growth are nominated by whole gradients in it (SpIEL-AG).
        selects: whether nothing trains in it, and gradients over batches choose the support.
    """

    name: str
    trains: str = ADAPTER
    fields: Mapping[str, Any] = field(default_factory=dict)
    watches_gradients: bool = False
    selects: bool = False


class WeightConfig(PeftConfig):
    """Base class of all configs here: equal ones give equal files, with a model card beside them."""

    # Not fields. The name of the adapter that is being saved, set by the hook that collects its tensors, since PEFT
    # tells `save_pretrained` only a folder.
    saved_as = "default"
    # Whether the config was read from a folder, for an adapter that is yet to be made; of one in a model, what tells
    # whether it is still as it was made for its file (`made_for_file`).
    awaits_file = False
    as_made: ClassVar[tuple[int, ...] | None] = None
    # How many bytes the weights in that folder have.
    file_bytes: ClassVar[int | None] = None
    # Canonical names of the tensors in that file, and what of `modules_to_save` was written into the config with it.
    held_in_file: ClassVar[frozenset[str] | None] = None
    saved_heads: ClassVar[frozenset[str] | None] = None
    # {parameter or module of that file: its number of weights} that this model has no place for (`other_heads`).
    left_out: ClassVar[Mapping[str, int]] = {}
    # {what other libraries call a field: what to write here}
    elsewhere: ClassVar[Mapping[str, str]] = _ELSEWHERE

    # The optimizer that `SparseTrainer` and plans take for the method, one of `planning.optimizer.OPTIMIZERS`.
    own_optimizer: ClassVar[str] = "adamw"
    # Whether weights are grown while training, so that each has an age of its own.
    grows_weights: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What plans and tables call the method."""
        return str(getattr(self.peft_type, "value", self.peft_type)).lower()

    @property
    def first_phase(self) -> str | None:
        """The phase of training that comes before this adapter's weights train (`training.phases.phase.PHASES`)."""
        return None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the method goes through while it trains from here on, in order."""
        return (Stage("training"),)

    @property
    def takes_quantised_base(self) -> bool:
        """Whether it trains on a base model whose weights are quantised."""
        return all(stage.trains != TARGETS for stage in self.stages)

    def __new__(cls, *args: Any, **kwargs: Any) -> WeightConfig:
        check_arguments(cls, args, kwargs, elsewhere=cls.elsewhere)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """All fields; sets as sorted lists, so that equal configs give equal files."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config (PEFT's method), and this library's part of the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        update_card(save_directory, self.to_dict(), adapter_name=self.saved_as)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> WeightConfig:
        """Load a config (PEFT's method), and note that weights are to follow, and what their file holds.

        Raises:
            ConfigError: a field holds something that it cannot.
            FormatError: the file is damaged, or of a type of adapter that is not known.
        """
        with _naming(Path(pretrained_model_name_or_path, subfolder or "")):
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download_kwargs, _, _ = cls._split_kwargs(kwargs)
        config.awaits_file = True
        where = pretrained_model_name_or_path
        config.file_bytes, config.held_in_file = outline_of_weights(where, subfolder=subfolder, **download_kwargs)
        config.saved_heads = frozenset(with_heads(config) or ())
        return config


class FieldsDoNotFit(FormatError, TypeError):
    """A file lacks fields of a config, or has some that it does not know: a TypeError in PEFT."""


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Let what is wrong with a config be told with the file that holds it."""
    place, again = f"{CONFIG_FILE} of '{folder}'", "Download the adapter again, or save it again."
    try:
        yield
    except SparseError as error:
        raise type(error)(f"{place}: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{place} is not valid JSON (nested too deep). {again}") from error
    except KeyError as error:
        raise FormatError(
            f"{place}: peft_type {error} is of no adapter that PEFT or peft_sparse knows. A newer version may know it: "
            "pip install -U peft peft-sparse."
        ) from error
    except TypeError as error:
        raise FieldsDoNotFit(f"{place} is damaged ({error}). {again}") from error
    except (AttributeError, ValueError) as error:
        if str(error).startswith("Can't find"):
            raise
        what = " is not valid JSON" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else " is damaged"
        raise FormatError(f"{place}{what} ({error}). {again}") from error
