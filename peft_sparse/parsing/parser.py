"""The shallow biaffine dependency parser: an encoder, and two biaffine products on its states."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput

from ..checks import check_one_of
from ..errors import ConfigError
from .features import NO_WORD
from .relations import RELATIONS
from .scores import IGNORED
from .trees import maximum_spanning_tree

ROOTS = ("cls", "pooled")
DECODERS = ("greedy", "mst")
# The field of the encoder's config that holds the parser's own settings.
_SETTINGS = "biaffine_parser"
_DEFAULTS: dict[str, Any] = {"root": "cls", "decode": "greedy", "roots": True}
_SUFFIX = "BiaffineParser"


@dataclass
class ParserOutput(ModelOutput):
    """What a `BiaffineParser` returns.

    Attributes:
        loss: [] float32, with labels.
        arcs: [batch, words] the head of each word, 0 the root; -100 where there is no word. In evaluation.
        relations: [batch, words] the relation to that head, as an id; -100 where there is no word. In evaluation.
        arc_scores: [batch, words, words + 1] float32, of each head for each word, with `output_scores`; -inf for heads
            that are no word of the sentence.
        relation_scores: [batch, words, labels] float32, with `output_scores`: at the gold heads in training with
            labels, at `arcs` else.
        hidden_states, attentions: of the encoder.
    """

    loss: Tensor | None = None
    arcs: Tensor | None = None
    relations: Tensor | None = None
    arc_scores: Tensor | None = None
    relation_scores: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Biaffine(nn.Module):
    """s[b, o, i, j] = [x_i; 1]^T W_o [y_j; 1], where a side without a bias has no 1.

    Args:
        size: width of x and y.
        outputs: number of outputs o.
        bias_x, bias_y: whether a 1 is appended to x, and to y.

    Attributes:
        weight: [outputs, size + bias_x, size + bias_y], zero at first.
    """

    def __init__(self, size: int, outputs: int, *, bias_x: bool, bias_y: bool) -> None:
        super().__init__()
        self.bias_x, self.bias_y = bias_x, bias_y
        self.weight = nn.Parameter(torch.zeros(outputs, size + bias_x, size + bias_y))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of all pairs: x [b, i, size], y [b, j, size] -> [b, outputs, i, j]."""
        return torch.einsum("bix,oxy,bjy->boij", self._with_one(x, self.bias_x), self.weight, self._y(y))

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores of each x with its own y: x, y [b, i, size] -> [b, i, outputs]."""
        return torch.einsum("bix,oxy,biy->bio", self._with_one(x, self.bias_x), self.weight, self._y(y))

    def _y(self, y: Tensor) -> Tensor:
        return self._with_one(y, self.bias_y)

    @staticmethod
    def _with_one(states: Tensor, bias: bool) -> Tensor:
        return functional.pad(states, (0, 1), value=1.0) if bias else states


class BiaffineParser:
    """A dependency parser: an encoder of transformers with a biaffine product for heads and one for relations.

        parser = BiaffineParser.from_pretrained("FacebookAI/xlm-roberta-base")
        tuned = get_peft_model(parser, LotteryTicketConfig(..., modules_to_save=BiaffineParser.HEADS))

    `from_pretrained` and `from_config` give a `PreTrainedModel` of the encoder's family (`BertBiaffineParser`, ...)
    that is an instance of this class too. The encoder is called as in that family's other models, so adapters of the
    encoder fit, and files of published parsers, whose heads are `biaffine_arcs.weight` and `biaffine_rels.weight`.

    A word's state is the mean of its subwords' last hidden states, after dropout. Each word as a dependent meets all
    words of its sentence and the root as heads. The loss is the mean over words of the cross-entropy over heads, plus
    that over relations at the gold head.

    Attributes:
        HEADS: names of the modules to give as `modules_to_save`.

    Source: Glavas and Vulic 2021, as in composable-sft and BiStil. Differs from their code in that padding is told
        apart from the head 0, so words on the root are learnt and counted (`roots=False` leaves them out of the loss
        as theirs does), and in that heads beyond the end of a sentence cannot be chosen.
    """

    HEADS = ("biaffine_arcs", "biaffine_rels")
    # The mean over the words of a batch is the loss: nothing is to be divided by a number of tokens.
    accepts_loss_kwargs = False

    config: Any
    training: bool

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        settings = _settings(config)
        has_pooler = {"add_pooling_layer": settings["root"] == "pooled"}
        encoder_class = encoder_of(config)
        takes = inspect.signature(encoder_class.__init__).parameters
        encoder = encoder_class(config, **(has_pooler if "add_pooling_layer" in takes else {}))
        if settings["root"] == "pooled" and getattr(encoder, "pooler", None) is None:
            raise ConfigError(f"root='pooled' needs an encoder with a pooler, and {type(encoder).__name__} has none.")
        setattr(self, self.base_model_prefix, encoder)
        size = config.hidden_size
        self.dropout = nn.Dropout(_dropout(config))
        self.biaffine_arcs = Biaffine(size, 1, bias_x=True, bias_y=False)
        self.biaffine_rels = Biaffine(size, config.num_labels, bias_x=True, bias_y=True)
        self.post_init()

    # ---- making one ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        labels: Sequence[str] | None = None,
        root: str | None = None,
        decode: str | None = None,
        roots: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A parser over a pretrained encoder, with heads at zero; or a saved parser.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args, kwargs: of transformers' `from_pretrained`.
            labels: names of the relations, in the order of their ids. Universal Dependencies' 37 and "_" by default.
            root: "cls" (the state of the first token is the root's vector, as in BiStil) or "pooled" (the pooler's
                output, as in composable-sft: the one for its published parsers).
            decode: "greedy" (the best head of each word on its own, as published) or "mst" (the best tree with one
                root); what evaluation predicts with unless the call says otherwise.
            roots: False leaves words on the root out of the loss. A saved parser knows all four.

        Raises:
            ConfigError: a setting or an encoder that there is no parser for, or other labels than a saved parser's, as
                many as those.
        """
        if surplus := {"num_labels", "id2label", "label2id"} & kwargs.keys():
            raise ConfigError(f"{sorted(surplus)[0]} is not taken: labels=[...] names the relations in their order.")
        if "config" not in kwargs:
            wanted = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "subfolder") if name in kwargs}
            kwargs["config"] = AutoConfig.from_pretrained(pretrained_model_name_or_path, **wanted)
        _check_saved_labels(kwargs["config"], labels)
        config = kwargs["config"] = _configured(kwargs["config"], labels, root, decode, roots)
        made = parser_class(config)
        return super(BiaffineParser, made).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_config(
        cls,
        config: PretrainedConfig,
        *,
        labels: Sequence[str] | None = None,
        root: str | None = None,
        decode: str | None = None,
        roots: bool | None = None,
    ) -> Any:
        """A parser with random weights and heads at zero; arguments as of `from_pretrained`."""
        config = _configured(config, labels, root, decode, roots)
        return parser_class(config)(config)

    # ---- computing -----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        word_ids: Tensor | None = None,
        labels_arcs: Tensor | None = None,
        labels_rels: Tensor | None = None,
        decode: str | None = None,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> ParserOutput:
        """Loss and parses of a batch.

        Args:
            input_ids, attention_mask, kwargs: of the encoder, [batch, subwords].
            word_ids: [batch, subwords] which word a subword belongs to, from 0; -1 for none.
            labels_arcs: [batch, words] heads, 0 the root; -100 where there is no word.
            labels_rels: [batch, words] ids of the relations; -100 where there is no word.
            decode: "greedy" or "mst", instead of the config's.
            output_scores: return all scores as well.

        Raises:
            ConfigError: no word ids, one kind of labels without the other, or labels for other words.
        """
        if word_ids is None or (labels_arcs is None) != (labels_rels is None):
            raise ConfigError(
                "a batch needs word_ids, and labels_arcs and labels_rels together or neither: collate it with "
                "ParserCollator"
            )
        encoded = self.base_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        states = self.dropout(encoded.last_hidden_state)
        words, is_word = _word_states(states, word_ids)
        heads = torch.cat([self._root(states, encoded, attention_mask)[:, None], words], 1)
        arc_scores = self.biaffine_arcs(words, heads)[:, 0].float()
        is_head = functional.pad(is_word, (1, 0), value=True)
        arc_scores = arc_scores.masked_fill(~is_head[:, None], -torch.inf)
        output = ParserOutput(hidden_states=encoded.get("hidden_states"), attentions=encoded.get("attentions"))
        relation_scores = None
        if labels_arcs is not None and labels_rels is not None:
            _check_labels(labels_arcs, is_word)
            relation_scores = self._relation_scores(words, heads, labels_arcs)
            output.loss = self._loss(arc_scores, relation_scores, labels_arcs, labels_rels)
        if not self.training or relation_scores is None:
            output.arcs = self._decode(arc_scores, is_word, decode or _settings(self.config)["decode"])
            relation_scores = self._relation_scores(words, heads, output.arcs)
            output.relations = relation_scores.argmax(-1).masked_fill(~is_word, IGNORED)
        if output_scores:
            output.arc_scores, output.relation_scores = arc_scores, relation_scores
        return output

    def _root(self, states: Tensor, encoded: Any, attention_mask: Tensor | None) -> Tensor:
        """[batch, size]; the first token is behind the padding where that is at the left."""
        is_pooled = _settings(self.config)["root"] == "pooled"
        if attention_mask is None or (is_pooled and bool(attention_mask[:, 0].all())):
            return encoded.pooler_output if is_pooled else states[:, 0]
        first = attention_mask.bool().int().argmax(1)
        rows = torch.arange(len(states), device=states.device)
        if not is_pooled:
            return states[rows, first]
        # Poolers take the first place, whatever is there.
        return self.base_model.pooler(encoded.last_hidden_state[rows, first][:, None])

    def _relation_scores(self, words: Tensor, heads: Tensor, arcs: Tensor) -> Tensor:
        chosen = arcs.clamp(min=0)[..., None].expand(-1, -1, heads.shape[-1])
        return self.biaffine_rels.pairwise(words, heads.gather(1, chosen)).float()

    def _loss(self, arc_scores: Tensor, relation_scores: Tensor, arcs: Tensor, relations: Tensor) -> Tensor:
        if not _settings(self.config)["roots"]:
            arcs = arcs.masked_fill(arcs == 0, IGNORED)
        return _mean_loss(arc_scores, arcs) + _mean_loss(
            relation_scores, relations.masked_fill(arcs == IGNORED, IGNORED)
        )

    def _decode(self, arc_scores: Tensor, is_word: Tensor, decode: str) -> Tensor:
        check_one_of("decode", decode, DECODERS)
        if bool(arc_scores.isnan().any()):
            raise ConfigError("the scores of heads are NaN, so there is no best one: the run that trained it diverged.")
        best = arc_scores.argmax(-1)
        if decode == "mst":
            found = arc_scores.detach().double().cpu()
            for row, count in enumerate(is_word.sum(1).tolist()):
                tree = maximum_spanning_tree(found[row, :count, : count + 1].numpy())
                best[row, :count] = torch.tensor(tree, device=best.device, dtype=best.dtype)
        return best.masked_fill(~is_word, IGNORED)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Biaffine):
            initialization.zeros_(module.weight)
        else:
            super()._init_weights(module)  # type: ignore[misc]


def _word_states(states: Tensor, word_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, words, size] means of the subwords' states, and [batch, words] which are words of the sentence.

    A product with zeros and ones, whose sums do not depend on the order that a GPU adds in.
    """
    last = word_ids.max(1).values
    count = int(last.max()) + 1
    if count < 1 or int(word_ids.min()) < NO_WORD:
        raise ConfigError("word_ids must be -1 (no word) or the number of a word, and name at least one word.")
    belongs = word_ids[..., None] == torch.arange(count, device=word_ids.device)
    totals = belongs.to(states.dtype).transpose(1, 2) @ states
    means = totals / belongs.sum(1).clamp(min=1)[..., None].to(states.dtype)
    return means, torch.arange(count, device=word_ids.device) <= last[:, None]


def _mean_loss(scores: Tensor, gold: Tensor) -> Tensor:
    """Mean over the counted words [batch, words]; 0, not NaN, where there is none."""
    total = functional.cross_entropy(scores.flatten(0, 1), gold.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (gold != IGNORED).sum().clamp(min=1)


def _check_labels(arcs: Tensor, is_word: Tensor) -> None:
    labelled = arcs != IGNORED
    if arcs.shape != is_word.shape or bool((labelled & ~is_word).any()):
        raise ConfigError(
            f"labels_arcs must be [batch, words] = {list(is_word.shape)} with -100 where there is no word, got "
            f"{list(arcs.shape)}."
        )
    if bool((arcs > is_word.sum(1, keepdim=True)).any()) or bool((arcs[labelled] < 0).any()):
        raise ConfigError("labels_arcs must be 0 (the root) to the number of words of the sentence.")


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    return {**_DEFAULTS, **(getattr(config, _SETTINGS, None) or {})}


def _configured(
    config: PretrainedConfig, labels: Sequence[str] | None, root: str | None, decode: str | None, roots: bool | None
) -> PretrainedConfig:
    """A copy of the encoder's config with the parser's settings: those given, else saved ones, else the defaults."""
    config = copy.deepcopy(config)
    is_saved = getattr(config, _SETTINGS, None) is not None
    given = {"root": root, "decode": decode, "roots": roots}
    settings = {**_settings(config), **{name: value for name, value in given.items() if value is not None}}
    check_one_of("root", settings["root"], ROOTS)
    check_one_of("decode", settings["decode"], DECODERS)
    check_one_of("roots", settings["roots"], (True, False))
    if labels is not None and (isinstance(labels, str) or len(set(labels)) != len(labels) or not labels):
        raise ConfigError(f"labels must be a list of different names, got {labels!r:.200}.")
    if labels is not None or not is_saved:
        names = list(labels if labels is not None else RELATIONS)
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    setattr(config, _SETTINGS, settings)
    return config


def _check_saved_labels(config: PretrainedConfig, labels: Sequence[str] | None) -> None:
    """Refuse names for a saved head's outputs that are not its own: each would mean another relation."""
    if labels is None or getattr(config, _SETTINGS, None) is None:
        return
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) == len(labels) and own != list(labels):
        raise ConfigError(
            f"labels: the saved parser has {own}, in this order, got {list(labels)}. Leave labels out; for a new head "
            "load the encoder alone: BiaffineParser.from_pretrained(<the encoder>, labels=[...])."
        )


def _dropout(config: PretrainedConfig) -> float:
    names = ("hidden_dropout_prob", "hidden_dropout", "dropout", "resid_pdrop")
    return next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 0.0)


def encoder_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that is the encoder of a config.

    Raises:
        ConfigError: there is none that gives a state for each token.
    """
    if type(config) not in MODEL_MAPPING or config.is_encoder_decoder or not hasattr(config, "hidden_size"):
        raise ConfigError(
            f"a BiaffineParser needs a model with one state for each token, and {type(config).__name__} is of another "
            "kind: an encoder such as BERT, XLM-R, DeBERTa or ModernBERT, or a decoder of text alone."
        )
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def parser_class(config: PretrainedConfig) -> type[Any]:
    """The parser's class over the encoder of a config."""
    return _class_over(encoder_of(config))


@functools.cache
def _class_over(encoder: type[PreTrainedModel]) -> type[Any]:
    family = next(cls for cls in encoder.__mro__[1:] if issubclass(cls, PreTrainedModel))
    if not family.base_model_prefix:
        raise ConfigError(f"{encoder.__name__} has no name in larger models, so no parser is made of it.")
    name = encoder.__name__.removesuffix("Model") + _SUFFIX
    return type(name, (BiaffineParser, family), {"__module__": __name__, "__doc__": BiaffineParser.__doc__})


def __getattr__(name: str) -> Any:
    """The classes that `parser_class` makes, by name: what a pickle and PEFT's `auto_mapping` ask for."""
    stem = name.removesuffix(_SUFFIX)
    if name.endswith(_SUFFIX) and stem and hasattr(transformers, f"{stem}Model"):
        return _class_over(getattr(transformers, f"{stem}Model"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
