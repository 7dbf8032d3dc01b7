"""A picture of each plot, of adapters that are invented: what the pages of the reference show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_sparse import SparseConfig
from peft_sparse.checkpoints import native
from peft_sparse.core.delta import SparseDelta
from peft_sparse.inspection.feature_importance import plot_importance
from peft_sparse.inspection.page import save_plot
from peft_sparse.inspection.reading import read_adapter
from peft_sparse.tuners.madg.importance import FeatureImportance

LAYERS, WIDTH, WORDS = 12, 48, 120
PARTS = {
    "attention.self.query.weight": (WIDTH, WIDTH),
    "attention.self.value.weight": (WIDTH, WIDTH),
    "intermediate.dense.weight": (4 * WIDTH, WIDTH),
    "output.dense.weight": (WIDTH, 4 * WIDTH),
}
EMBEDDINGS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Picture:
    """One picture of the reference: its file's name, what made it, and what there is to see."""

    name: str
    call: str
    caption: str


PICTURES = (
    Picture(
        "distribution",
        'plot_adapters(["language", "task"], kind="distribution")',
        "Where the tuned weights lie, by layer. Under a uniform budget all layers have equally many, and the bars show "
        "the squared change instead.",
    ),
    Picture(
        "overlap",
        'plot_adapters(["language", "task", "other-task"], kind="overlap")',
        "How many weights each two adapters share, beside what chance would give, and how often their signs differ.",
    ),
    Picture(
        "tokens",
        'plot_adapters(["language"], kind="tokens")',
        "The tokens whose embeddings changed most, with the number of tuned weights in each row.",
    ),
    Picture(
        "importance",
        'plot_importance(model.feature_importance(), "importance.png")',
        "Which typological features move the adapters that a MAD-G hypernetwork generates, in all and at each site.",
    ),
)


def draw(folder: Path, scratch: Path) -> None:
    """Write all pictures into a folder; the adapters go into `scratch`."""
    random = torch.Generator().manual_seed(0)
    language, task, other = (scratch / name for name in ("language", "task", "other-task"))
    _save(language, random, slope=0.0, embeddings=0.3)
    _save(task, random, slope=0.08, embeddings=0.0)
    _save(other, random, slope=0.08, embeddings=0.0, like=task)
    _save_tokenizer(language)
    save_plot([language, task], folder / "distribution.svg", kind="distribution")
    save_plot([language, task, other], folder / "overlap.svg", kind="overlap")
    save_plot([language], folder / "tokens.svg", kind="tokens", tokenizer=str(language))
    plot_importance(_importance(random), folder / "importance.svg", count=12)


def _save(folder: Path, random: torch.Generator, *, slope: float, embeddings: float, like: Path | None = None) -> None:
    """An adapter whose later layers have more weights, by `slope`; of those of `like` it tunes every third as well."""
    known = read_adapter(like).deltas if like is not None else {}
    shapes = {f"encoder.layer.{i}.{part}": shape for i in range(LAYERS) for part, shape in PARTS.items()}
    deltas = {}
    for number, (name, shape) in enumerate(shapes.items()):
        density = 0.05 * (1 + slope * (number // len(PARTS)))
        chosen = torch.rand(shape[0] * shape[1], generator=random) < density
        if name in known:
            chosen[known[name].indices[::3].long()] = True
        deltas[name] = _delta(chosen, shape, random, size=1 + number / len(shapes))
    if embeddings:
        rows = torch.rand(WORDS, 1, generator=random) ** 3
        chosen = (torch.rand(WORDS, WIDTH, generator=random) < embeddings * rows).flatten()
        deltas[EMBEDDINGS] = _delta(chosen, (WORDS, WIDTH), random, size=3.0)
    folder.mkdir()
    counts = {name: delta.count for name, delta in deltas.items()}
    budget = "global" if slope else "uniform"
    config = SparseConfig(density=0.05, budget=budget, counts=counts, base_model_name_or_path="invented/encoder")
    config.save_pretrained(str(folder))
    save_file(native.build(deltas, None), folder / native.SOURCE, metadata={"format": "pt"})


def _delta(chosen: torch.Tensor, shape: tuple[int, int], random: torch.Generator, *, size: float) -> SparseDelta:
    indices = chosen.nonzero().flatten().int()
    values = 0.01 * size * torch.randn(indices.numel(), generator=random)
    return SparseDelta(indices, values, shape).check()


def _save_tokenizer(folder: Path) -> None:
    syllables = [consonant + vowel for consonant in "kmnpst" for vowel in "aeiou"]
    words = ["[UNK]", *(f"{a}{b}" for a in syllables for b in syllables)][:WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def _importance(random: torch.Generator) -> FeatureImportance:
    features = [f"S_INVENTED_FEATURE_{letter}" for letter in "ABCDEFGHIJKLMNOP"]
    by_site = torch.rand(LAYERS, len(features), generator=random, dtype=torch.float64) ** 2
    by_site *= torch.linspace(2.0, 0.2, len(features), dtype=torch.float64)
    sites = [f"encoder.layer.{i}" for i in range(LAYERS)]
    return FeatureImportance(features, sites, by_site, by_site.square().sum(0).sqrt())
