"""Trainers whose loss is how far a student is from its teacher: any Hugging Face trainer, sparse ones included."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..errors import ConfigError
from ..training.derived import derived_trainer
from ..training.languages.multisource import LANGUAGE
from .attention import AttentionMaps, inner_model, is_causal, is_checkpointing, use_eager_attention
from .last_layer import LastLayer
from .losses import (
    DistillationLoss,
    attention_loss,
    hidden_loss,
    loss_named,
    pair_mask,
    prediction_loss,
    prediction_mask,
)
from .student import DEPTH_KEY, LAYERS_KEY, stack_of
from .teacher import Teacher

logger = logging.getLogger(__name__)

_BULKY = ("hidden_states", "attentions")
# What transformers calls the problems whose logits are no distribution over labels.
_NO_DISTRIBUTION = {"multi_label_classification", "regression"}


class DistillationTraining:
    """What `distilled_trainer` adds to a trainer class.

    The loss is the weighted sum of the terms of a `DistillationLoss`, in training, in evaluation and where an adapter's
    weights are selected by gradients; each term is logged ("loss_attention", "loss_hidden", "loss_prediction",
    "loss_labels"). Labels do nothing but say which predictions count, unless `loss.labels` is above 0. Teacher and
    student see the same batch, with the same mask; the batch's "language" goes to the teacher alone. Terms of
    attention switch both models to eager attention, for no other gives its probabilities.

    Args:
        args, kwargs: of the trainer class.
        teacher: the teacher; None if no term of the loss needs one.
        loss: a `DistillationLoss`, or one by name: "general" (attention and hidden states: phase 1), "teacher_forcing"
            (predictions as well: phase 2), or "self_taught" (labels alone: phase 2 without a teacher).
        layers: for each layer of the student, the index of the teacher's that it learns from; None takes what
            `make_student` wrote into the student's config, or else every n-th with the last one.

    Raises:
        ConfigError: teacher and student do not fit each other: vocabulary, hidden size, heads, layers.

    Source: BiStil (Ansell et al. 2023, arXiv:2306.01709), sections 3.2 and 3.3; thesis 5.3. Differs from the authors'
        code in that padding is left out.
    """

    model: Any
    args: Any
    accelerator: Any

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None = None,
        loss: DistillationLoss | str = "general",
        layers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.distillation_loss = loss_named(loss)
        if self.distillation_loss.needs_teacher and not isinstance(teacher, Teacher):
            raise ConfigError(
                f"teacher must be a Teacher(base, languages={{...}}, task=...), got {type(teacher).__name__}. Without "
                "one there is loss='self_taught'."
            )
        self.teacher = teacher if self.distillation_loss.needs_teacher else None
        self._layers = None if layers is None else list(layers)
        self._aligned: list[int] = []
        self._prepared: nn.Module | None = None
        self._terms: dict[bool, dict[str, list[tuple[Tensor, int]]]] = {True: {}, False: {}}
        super().__init__(*args, **kwargs)
        if self.teacher is not None:
            if self.args.n_gpu > 1:
                raise ConfigError(
                    f"a student learns from its teacher's layers on one GPU a process, got {self.args.n_gpu} GPUs: the "
                    "trainer would copy the student to all of them (nn.DataParallel), and copies are not read. Start a "
                    "process for each GPU (torchrun, accelerate launch), or show one alone: CUDA_VISIBLE_DEVICES=0."
                )
            # Each micro-batch has a mean of its own, which the trainer divides by the number of those in a step.
            self.model_accepts_loss_kwargs = False
            self._prepare()

    # ---- fitting -------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Check that teacher and student fit, and make them ready; again if `model_init` made another student."""
        teacher = self.teacher
        assert teacher is not None
        student, target = inner_model(self.model), inner_model(teacher.model)
        if {id(one) for one in student.parameters()} & {id(one) for one in target.parameters()}:
            raise ConfigError("the teacher shares weights with the student, and so would change with it: load it anew.")
        _check_same("rows of embeddings", *(one.get_input_embeddings().weight.shape[0] for one in (student, target)))
        needs_maps, needs_hidden = self.distillation_loss.attention > 0, self.distillation_loss.hidden > 0
        own, theirs = (one.config.get_text_config() for one in (student, target))
        if needs_hidden:
            _check_same("hidden_size", own.hidden_size, theirs.hidden_size)
        if needs_maps:
            _check_same("num_attention_heads", own.num_attention_heads, theirs.num_attention_heads)
            for model in (self.model, teacher.model):
                use_eager_attention(model)
            self._warn_of_dropout(student)
        if needs_maps or needs_hidden:
            self._aligned = _aligned(student, target, self._layers)
        teacher.to(self.args.device)
        self._prepared = self.model

    def _warn_of_dropout(self, student: nn.Module) -> None:
        if any(isinstance(one, nn.Dropout) and one.p > 0 for one in student.modules()):
            logger.warning(
                "The student has dropout, and attention maps are compared after it: make_student(..., dropout=0.0)."
            )

    # ---- the loss ------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a batch; with `return_outputs` the student's outputs, hidden states left out."""
        if self.teacher is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self._prepared is not self.model:
            self._prepare()
        given = dict(inputs)
        language = given.pop(LANGUAGE, None)
        weights = self.distillation_loss
        aligned = self._aligned if weights.attention else []
        own = AttentionMaps(self.model, range(len(aligned)))
        theirs = AttentionMaps(self.teacher.model, aligned)
        lasts = self._last_layers()
        terms: dict[str, Tensor] = {}
        with own, theirs, lasts[0], lasts[1]:
            outputs = self._student_outputs(model, given, terms)
            unlabelled = {key: value for key, value in given.items() if key != "labels"}
            target = self.teacher(language, **unlabelled, output_hidden_states=weights.hidden > 0)
        mask = _token_mask(given)
        if weights.attention:
            maps = own.maps()
            self._check_gradient(maps, "attention maps", "attention")
            causal = is_causal(self.model)
            masks = [pair_mask(mask, causal=causal, window=own.windows[index]) for index in range(len(maps))]
            terms["attention"] = attention_loss(maps, theirs.maps(), masks)
        if weights.hidden:
            terms["hidden"] = hidden_loss(*self._hidden_states(outputs, target, lasts), mask)
        if weights.prediction:
            terms["prediction"] = self._prediction(outputs, target, mask, given.get("labels"))
        loss = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        self._keep(model.training, terms, len(mask))
        if not return_outputs:
            return loss
        return loss, type(outputs)(**{key: value for key, value in outputs.items() if key not in _BULKY})

    def _student_outputs(self, model: nn.Module, given: dict[str, Any], terms: dict[str, Tensor]) -> Any:
        asked = {**given, "output_hidden_states": self.distillation_loss.hidden > 0}
        if not self.distillation_loss.labels:
            asked.pop("labels", None)
            return model(**asked)
        terms["labels"], outputs = super().compute_loss(model, asked, return_outputs=True)
        return outputs

    def _last_layers(self) -> tuple[LastLayer, LastLayer]:
        """Of student and teacher, where one's last layer learns from, or teaches, a layer that is not the last."""
        assert self.teacher is not None
        own = theirs = False
        if self.distillation_loss.hidden:
            last = stack_of(inner_model(self.teacher.model))[1] - 1
            own, theirs = self._aligned[-1] != last, last in self._aligned[:-1]
        return LastLayer(self.model, wanted=own), LastLayer(self.teacher.model, wanted=theirs)

    def _hidden_states(
        self, outputs: Any, target: Any, lasts: tuple[LastLayer, LastLayer]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The embeddings and layers of the student, and what each of them learns from."""
        own = list(outputs["hidden_states"])
        theirs = [target.hidden_states[0], *(target.hidden_states[index + 1] for index in self._aligned)]
        if lasts[0].output is not None:
            self._check_gradient([lasts[0].output], "hidden states of the last layer", "hidden")
            own[-1] = lasts[0].output
        if lasts[1].output is not None:
            last = len(target.hidden_states) - 2
            for place, index in enumerate(self._aligned[:-1], start=1):
                theirs[place] = lasts[1].output if index == last else theirs[place]
        return own, theirs

    def _prediction(self, outputs: Any, target: Any, mask: Tensor, labels: Tensor | None) -> Tensor:
        temperature = self.distillation_loss.temperature
        spans = [name for name in ("start_logits", "end_logits") if name in outputs]
        if spans:
            everywhere = mask.new_ones(len(mask))
            logits = [(_over_tokens(outputs[name], mask), _over_tokens(target[name], mask)) for name in spans]
            found = [prediction_loss(own, theirs, everywhere, temperature=temperature) for own, theirs in logits]
            return torch.stack(found).mean()
        if "logits" not in outputs or "logits" not in target:
            raise ConfigError("prediction needs models that give logits: a student and a teacher with heads.")
        own, theirs = outputs["logits"], target["logits"]
        if own.shape != theirs.shape or own.shape[-1] < 2:
            raise ConfigError(
                "prediction needs logits of the same two labels or more from student and teacher, got the shapes "
                f"{tuple(own.shape)} and {tuple(theirs.shape)}."
            )
        configs = [inner_model(one).config for one in (self.model, self.teacher.model)]
        if _NO_DISTRIBUTION & {config.problem_type for config in configs}:
            raise ConfigError("prediction compares distributions over labels that exclude each other: prediction=0.")
        _check_labels(*(_names_of_labels(config, own.shape[-1]) for config in configs))
        if own.dim() == 2:
            counted = mask.new_ones(len(own))
        else:
            size = inner_model(self.model).config.get_text_config().vocab_size
            next_token = own.shape[-1] == size and is_causal(self.model)
            counted = prediction_mask(mask, labels, next_token=next_token)
        return prediction_loss(own, theirs, counted, temperature=temperature)

    def _check_gradient(self, caught: Sequence[Tensor], what: str, field: str) -> None:
        checkpoints = torch.is_grad_enabled() and is_checkpointing(inner_model(self.model))
        if checkpoints and not all(one.requires_grad for one in caught):
            raise ConfigError(
                f"{what} have no gradient under reentrant gradient checkpointing. Set "
                f"gradient_checkpointing_kwargs={{'use_reentrant': False}}, or distil without: {field}=0."
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As the trainer's; without labels there is a loss as well."""
        has_labels = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        if self.teacher is None or has_labels:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None

    # ---- logs ----------------------------------------------------------------------------------------

    def _keep(self, training: bool, terms: Mapping[str, Tensor], size: int) -> None:
        # As the trainer's own loss: micro-batches count alike in training, examples in evaluation.
        weight = 1 if training else min(size, self.args.eval_batch_size)
        for name, term in terms.items():
            self._terms[training].setdefault(name, []).append((term.detach().float(), weight))

    def _means(self, training: bool, prefix: str) -> dict[str, float]:
        """{name of a term: its mean since this was last asked for, over all processes}."""
        found, self._terms[training] = self._terms[training], {}
        means = {}
        for name, kept in found.items():
            total = torch.stack([term * weight for term, weight in kept]).sum()
            sums = torch.stack([total, total.new_tensor(float(sum(weight for _, weight in kept)))])
            total, count = self.accelerator.gather(sums[None]).sum(0).tolist()
            means[f"{prefix}{name}"] = total / count
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each term since the last time."""
        if "loss" in logs:
            logs.update(self._means(True, "loss_"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the metrics have the mean of each term."""
        self._terms[False] = {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        output.metrics.update(self._means(False, f"{prefix}_loss_"))
        return output


def _check_same(what: str, own: int, theirs: int) -> None:
    if own != theirs:
        raise ConfigError(
            f"student and teacher must have the same {what}, got {own} and {theirs}. Reduce the vocabulary first, and "
            "make teacher and student of the reduced model."
        )


def _names_of_labels(config: PretrainedConfig, count: int) -> list[str] | None:
    """Names of so many outputs; None if the config has none for them but transformers' own ("LABEL_0")."""
    known = config.id2label or {}
    names = [known[index] for index in sorted(known)]
    return names if len(names) == count and names != [f"LABEL_{index}" for index in range(count)] else None


def _check_labels(student: list[str] | None, teacher: list[str] | None) -> None:
    if student is not None and teacher is not None and student != teacher:
        raise ConfigError(
            f"student and teacher must have the same labels in the same order (config.id2label), got {student} and "
            f"{teacher}. Make the student's head with the teacher's labels, or distil without: prediction=0."
        )


def _aligned(student: nn.Module, teacher: nn.Module, layers: Sequence[int] | None) -> list[int]:
    own, theirs = stack_of(student)[1], stack_of(teacher)[1]
    found = layers if layers is not None else getattr(student.config, LAYERS_KEY, None)
    depth = getattr(student.config, DEPTH_KEY, theirs)
    if layers is None and depth != theirs:
        raise ConfigError(
            f"the student was made of a model of {depth} layers, of which it has {found}, the teacher has {theirs}: "
            "say which of the teacher's layers it learns from, layers=[...]."
        )
    if found is None:
        if theirs % own:
            raise ConfigError(
                f"the teacher's {theirs} layers are no multiple of the student's {own}: give layers=[...]."
            )
        found = list(range(theirs // own - 1, theirs, theirs // own))
    if len(found) != own or not all(isinstance(one, int) and 0 <= one < theirs for one in found):
        raise ConfigError(
            f"layers must name one of the teacher's {theirs} layers for each of the student's {own}, got {list(found)}."
        )
    return list(found)


def _token_mask(inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2:
            raise ConfigError(f"attention_mask must be [batch, tokens], got the shape {tuple(mask.shape)}.")
        return mask
    shaped = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    return torch.ones_like(shaped, dtype=torch.long)


def _over_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits over the tokens of a text, of which padding gets no share."""
    return logits.float().masked_fill(~mask.bool(), torch.finfo(torch.float32).min / 4)


@functools.cache
def distilled_trainer(trainer_class: type[Trainer]) -> type[Any]:
    """A trainer class that distils; see `DistillationTraining` for what that adds.

    With `SparseTrainer`, dense phase, selection and sparse phase all go by the distillation loss: LT-SFT, SC-SFT,
    DeFT-X and one-shot criteria.

    Args:
        trainer_class: `transformers.Trainer` or a class derived from it: `SparseTrainer`, TRL's, your own.

    Returns:
        A class derived from both, called "Distilled" and the class's name; the same one for the same argument.

    Raises:
        ConfigError: not a trainer class.
    """
    return derived_trainer(trainer_class, DistillationTraining, prefix="Distilled")


DistillationTrainer = distilled_trainer(Trainer)
