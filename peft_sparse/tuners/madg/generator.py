"""The hypernetwork: typological vector -> language embedding -> weights of the adapter at each site."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.autocast import without_autocast
from ...core.ops import is_recorded
from ...core.sharded import gathered, how_sharded, in_several_processes
from ...errors import ConfigError
from ...typology import Typology
from ..bottleneck.adapter import (
    NEAR_IDENTITY_STD,
    RANDOM_STD,
    Bottleneck,
    BottleneckWeights,
    activation_named,
    bottleneck_output,
)
from ..bottleneck.applying import PerExample
from ..common.base_module import NeverOffloaded
from .config import MadGConfig
from .languages import Languages, MadGState, check_one_per_example
from .saved_typology import as_typology, digest_of, save_vector, saved_vectors
from .weight_cache import WeightCache


class GenerateAndPassOn(torch.autograd.Function):
    """(e W', W). The second is for the next site, so that in the backward one gradient of W goes from site to site.

    Each site adds its part to it in place. If W gave its gradient to every site separately, autograd would allocate,
    fill and add up a tensor of W's size at each, which takes longer than the adapter there.
    """

    @staticmethod
    def forward(embedding: Tensor, generator: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(embedding, generator), generator.view_as(generator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, so_far: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, so_far
        embedding, generator = ctx.saved_tensors
        with without_autocast(grad.device.type):
            if so_far is None:
                so_far = grad.t() @ embedding
            elif torch.is_grad_enabled():
                so_far = so_far.addmm(grad.t(), embedding)
            else:
                so_far.addmm_(grad.t(), embedding)
            return grad @ generator, so_far


class SharedPart(NeverOffloaded):
    """What all sites of one MAD-G adapter share; it lies in the first of them.

    Attributes:
        language_projection: V [d_l, F].
        generator: W [2hm, d_l + d_b] with layer embeddings; None without, where every site has its own.
        features: hash of the names of the features, uint8 [32]; a file with another one is refused.
        config: the adapter's config in the model, whose `saved_typology` takes the vectors of the languages used.
    """

    def __init__(self, config: MadGConfig, *, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        names = config.saved_typology["feature_names"]
        empty = partial(torch.empty, device=device, dtype=torch.float32)
        self.language_projection = nn.Parameter(empty(config.language_dim, len(names)))
        self.generator = None
        if config.layer_dim is not None:
            self.generator = nn.Parameter(empty(num_generated(config, width), config.language_dim + config.layer_dim))
            init_generator(self.generator, config)
        self.register_buffer("features", digest_of(names))
        nn.init.normal_(self.language_projection, std=1 / math.sqrt(len(names)))
        self._vectors = saved_vectors(config.saved_typology)
        self._typology: Typology | None = None

    def embeddings(self, languages: list[str]) -> Tensor:
        """V t of each language: [U, d_l]."""
        projection = gathered(self.language_projection)
        if projection.dim() != 2:
            raise ConfigError(
                f"the projection of languages is {how_sharded(projection)}, and all layers of MAD-G read it: this way "
                "of sharding shows it to one of them only. Use FSDP2 (fsdp_config={'version': 2}) or DDP."
            )
        vectors = []
        for code in languages:
            vector = self.vector(code)
            if vector.device != projection.device and not projection.is_meta:
                vector = self._vectors[code] = vector.to(projection.device)
            vectors.append(vector)
        return F.linear(torch.stack(vectors).to(projection), projection)

    def generate(self, embedding: Tensor, passed_on: dict[SharedPart, Tensor] | None) -> Tensor:
        """W e for each row e of `embedding`, which is a language's and the site's: [U, 2hm].

        Args:
            embedding: [U, d_l + d_b].
            passed_on: the generators as their latest sites passed them on in this forward of the base model; None
                outside of one, where nobody could say when it ends.
        """
        # Autocast would cast W once for each site: it keeps casts of parameters, not of what is passed on.
        with without_autocast(self.generator.device.type):
            generator = gathered(self.generator)
            embedding = embedding.to(generator)
            # A compiler plans its memory itself; FSDP frees what it gathered as soon as the site that has W is done.
            planned = is_recorded() or in_several_processes()
            if planned or not (torch.is_grad_enabled() and generator.requires_grad):
                return F.linear(embedding, generator)
            passed_on = {} if passed_on is None else passed_on
            generated, passed_on[self] = GenerateAndPassOn.apply(embedding, passed_on.get(self, generator))
            return generated

    def vector(self, code: str) -> Tensor:
        """A language's typological vector [F]: the saved one, or else the typology's, which is then saved.

        Raises:
            ConfigError: it is neither saved nor in the typology, or that is another typology than the adapter's.
        """
        if code not in self._vectors:
            vector = self._source(code).vector(code)
            save_vector(self.config.saved_typology, code, vector)
            self._vectors[code] = vector
        return self._vectors[code]

    def set_typology(self, typology: Typology) -> None:
        """Where to look for languages that are not saved with the adapter.

        Raises:
            ConfigError: it is not the typology that the adapter was trained on.
        """
        typology.require_same(self.config.saved_typology)
        self._typology = typology

    def _source(self, code: str) -> Typology:
        if self._typology is None:
            try:
                self.set_typology(as_typology(self.config.typology, self.config.features))
            except (ImportError, OSError, ValueError) as error:
                known = sorted(self._vectors)
                raise ConfigError(
                    f"the vector of {code!r} is not saved with the adapter, which has {known}, and no typology could "
                    f"be had: {error} Give the one that it was trained on with model.set_typology(...)."
                ) from error
        return self._typology


class SiteGenerator(NeverOffloaded):
    """One site of a MAD-G adapter: generates the weights of a bottleneck and computes with them.

    Args:
        config: the adapter's config.
        shared: what its sites share.
        state: which language it is to compute with.
        owns_shared: whether this is the first site, in which the shared part lies.
        width: h.
        device: where to make the parameters.

    Attributes:
        generator: W of this site [2hm, d_l], down-projection before up-projection, row by row; without layer
            embeddings.
        layer_embedding: e_b [d_b]; with layer embeddings.
    """

    def __init__(
        self,
        config: MadGConfig,
        *,
        shared: SharedPart,
        state: MadGState,
        owns_shared: bool,
        width: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config, self.width, self._state = config, width, state
        self.shared = shared if owns_shared else None
        # In a tuple, so that it is not this site's module.
        self._shared = (shared,)
        self._cache = WeightCache()
        self.activation = activation_named(config.activation)
        self.dropout = nn.Dropout(config.dropout)
        if config.layer_dim is None:
            size = (num_generated(config, width), config.language_dim)
            self.generator = nn.Parameter(torch.empty(size, device=device, dtype=torch.float32))
            init_generator(self.generator, config)
        else:
            self.layer_embedding = nn.Parameter(torch.randn(config.layer_dim, device=device, dtype=torch.float32))

    def generate(self, languages: list[str]) -> list[BottleneckWeights]:
        """The weights of each language's bottleneck at this site, with gradients (equations 3.1 and 3.2).

        Cost: reads W once for all the languages, 2hm(d_l + d_b) numbers.
        """
        shared = self._shared[0]
        embedding = shared.embeddings(languages)
        if self.config.layer_dim is None:
            generator = gathered(self.generator)
            generated = F.linear(embedding.to(generator), generator)
        else:
            layer = gathered(self.layer_embedding).to(embedding).expand(len(languages), -1)
            generated = shared.generate(torch.cat([embedding, layer], dim=1), self._state.passed_on)
        size, width = self.config.size_for(self.width), self.width
        # Cut in one go, so that the backward puts the gradients together in one go.
        halves = generated.view(2 * len(languages), size * width).unbind()
        zeros = generated.new_zeros(size), generated.new_zeros(width)
        return [
            BottleneckWeights(down.view(size, width), zeros[0], up.view(width, size), zeros[1])
            for down, up in zip(halves[::2], halves[1::2], strict=True)
        ]

    def _weights_for(self, language: str) -> BottleneckWeights:
        """One language's weights, which are generated once for many forwards where nothing is trained."""
        if is_recorded():
            return self.generate([language])[0]
        # FSDP fills the same tensors with other values, and their versions stay.
        if self.training or torch.is_grad_enabled() or in_several_processes():
            self._cache.drop()
            return self.generate([language])[0]
        sources = [*self._shared[0].parameters(), *self.parameters(recurse=False)]
        return self._cache.get(language, sources, lambda: self.generate([language])[0])

    def train(self, mode: bool = True) -> SiteGenerator:
        """As any module's; in training no generated weights are kept."""
        if mode:
            self._cache.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteGenerator:
        self._cache.drop()
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, languages: Languages | None = None) -> Tensor:
        """What is to be added to the residual: [B, ..., h] like `x`, in its dtype.

        Args:
            x: [B, ..., h].
            languages: those of its examples; what is set if None.
        """
        current = self._state.current() if languages is None else languages
        if isinstance(current, str):
            return self._add(self._weights_for(current), x)
        self._cache.drop()
        check_one_per_example(current, len(x))
        codes = list(dict.fromkeys(current))
        adapters = {
            code: partial(self._add, weights) for code, weights in zip(codes, self.generate(codes), strict=True)
        }
        return PerExample(current, adapters, replaces=False)(x)

    def _add(self, weights: BottleneckWeights, x: Tensor) -> Tensor:
        return self.dropout(self.config.scaling * bottleneck_output(weights, x, self.activation)).to(x.dtype)

    @torch.no_grad()
    def built_in(self, language: str) -> Bottleneck:
        """A plain bottleneck module with a language's weights."""
        config, weights = self.config, self.generate([language])[0]
        bottleneck = Bottleneck(
            self.width,
            config.size_for(self.width),
            activation=config.activation,
            scaling=config.scaling,
            dropout=config.dropout,
            device=weights.down_weight.device,
        ).to(weights.down_weight.dtype)
        bottleneck.set_weights(weights)
        return bottleneck


def num_generated(config: MadGConfig, width: int) -> int:
    """Number of weights of one generated adapter module: 2hm."""
    return 2 * width * config.size_for(width)


@torch.no_grad()
def init_generator(generator: Tensor, config: MadGConfig) -> None:
    """Give W its starting values; see `MadGConfig`."""
    std = NEAR_IDENTITY_STD if config.init_weights else RANDOM_STD
    nn.init.normal_(generator, std=std / math.sqrt(generator.shape[1]))
    if config.init == "identity" and config.init_weights:
        # The second half generates the up-projection.
        nn.init.zeros_(generator[len(generator) // 2 :])
