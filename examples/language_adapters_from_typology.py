"""Generate a language adapter from typological features alone, for a language that training has not seen.

    python examples/language_adapters_from_typology.py

MAD-G-LS, a hypernetwork, learns from text of many languages to turn a language's features into a bottleneck adapter.
Without arguments eighteen invented languages and a tiny BERT stand in for real ones.

    python examples/language_adapters_from_typology.py --data DIR --model MODEL --typology FILE --unseen quy

takes real ones: DIR/<language>.txt, a sentence a line, and lang2vec's features, which FILE holds or pip installed. Text
may also be in CSV, JSONL or Parquet files; in one file or data set of the Hub with a column of languages
(`--language-column`); or in a set of the Hub whose configurations are the languages.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import typer
from _languages import UNSEEN, Corpus, invented_corpus, read_corpus, tiny_multilingual_bert
from _masked_lm import MaskedLM, first_words, one_for_all, plot_losses
from _readers import run
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, set_seed

from peft_sparse import MadGConfig

console = Console()


def generated_losses(lm: MaskedLM, mad_g, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Of each language's text, with the adapter that is generated for the pivot (MAD-G-en) and with its own."""
    of_pivot, of_own = {}, {}
    for code in track(corpus.text, "generated adapters"):
        for losses, language in ((of_pivot, corpus.pivot), (of_own, code)):
            with mad_g.set_language(language):
                losses[code] = lm.loss(mad_g, code)
    return {f"{corpus.pivot}'s, generated": of_pivot, "its own, generated": of_own}


def show(losses: dict[str, dict[str, float]], unseen: str) -> None:
    """A row for each way to adapt; the mean of the seen languages where they were measured."""
    table = Table("adapter", f"{unseen} (unseen)", "mean of the others", title="masked-LM loss on held-out text")
    for name, row in losses.items():
        seen = [loss for code, loss in row.items() if code != unseen]
        table.add_row(name, f"{row[unseen]:.3f}", f"{sum(seen) / len(seen):.3f}" if seen else "")
    console.print(table)


def main(
    data: Annotated[
        str, typer.Option(help="Real text: a folder, pattern, file or Hub id. \\[default: invented languages]")
    ] = "",
    text_column: Annotated[str, typer.Option(help="What the data call the text.")] = "text",
    language_column: Annotated[str, typer.Option(help="Column of language codes, of data in one table.")] = "",
    model: Annotated[str, typer.Option(help="Encoder for real text: a directory or hub id.")] = "",
    typology: Annotated[Path | None, typer.Option(help="File of typological features, with --data.")] = None,
    unseen: Annotated[str, typer.Option(help="Language left out of training. \\[default: an invented one]")] = "",
    pivot: Annotated[str, typer.Option(help="Language whose adapter is the baseline, with --data.")] = "eng",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training the hypernetwork.")] = 1500,
    rate: Annotated[
        float | None, typer.Option(help="Peak rate of the hypernetwork. \\[default: 2e-3; 3e-4 with --data]")
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="Words of the unseen language to fine-tune on.")] = 1000,
    fine_tuning_steps: Annotated[int, typer.Option(min=1, help="Steps of fine-tuning.")] = 100,
    fine_tuning_rate: Annotated[float, typer.Option(help="Its peak learning rate.")] = 2e-3,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the losses: a .png file.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the invented languages.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the adapters are saved.")] = Path("outputs/typology"),
) -> None:
    """Train MAD-G-LS without one language, generate that language's adapter, and compare losses on its text."""
    set_seed(seed)
    if not data:
        corpus, unseen = invented_corpus(seed), unseen or UNSEEN
    elif model and unseen:
        corpus = read_corpus(data, typology, pivot, console, column=text_column, language_column=language_column)
    else:
        raise typer.BadParameter("--data needs an encoder, --model, and a language to leave out, --unseen")
    asked, unseen = unseen, corpus.called(unseen)
    others = {code: sentences for code, sentences in corpus.text.items() if code != unseen}
    if unseen is None or unseen == corpus.called(corpus.pivot) or not others:
        raise typer.BadParameter(
            f"must be one of several languages with text ({', '.join(corpus.text)}) and not the pivot, got {asked!r}",
            param_hint="--unseen",
        )
    base = tiny_multilingual_bert(output / "tiny_bert", unseen, seed=seed) if not data else model
    lm = MaskedLM(AutoTokenizer.from_pretrained(base), corpus.held_out, output)
    encoder = lm.encoder(base, others, steps=steps, console=console)
    losses = {"none": {code: lm.loss(encoder, code) for code in track(corpus.text, "no adapter")}}

    width = encoder.config.hidden_size // 2  # the thesis's ratio
    config = MadGConfig(bottleneck_size=width, layer_dim=32, typology=corpus.typology)
    mad_g = get_peft_model(copy.deepcopy(encoder), config)
    # Every batch names its language, which the model takes as an input: there is nothing to activate.
    # A step of Adam moves generated weights many times as far as weights of their own; see MadGConfig.
    rate = rate or (2e-3 if not data else 3e-4)
    lm.fit(mad_g, others, steps=steps, rate=rate, activate=None)
    mad_g.save_pretrained(output / "mad_g")
    losses |= generated_losses(lm, mad_g, corpus)

    # A generated adapter is an ordinary bottleneck adapter: it goes into the base model, without the hypernetwork.
    # PEFT saves an adapter into the folder itself, not below it, if its name is "default".
    generated = mad_g.generate_adapter(unseen, adapter_name="default")
    generated.save_pretrained(output / "generated")
    few = {unseen: first_words(corpus.text[unseen], words)}
    tuned = generated.add_to(copy.deepcopy(encoder))
    new = get_peft_model(copy.deepcopy(encoder), generated.config)
    for name, adapted in (("a new adapter", new), ("its own", tuned)):
        lm.fit(adapted, few, steps=fine_tuning_steps, rate=fine_tuning_rate, activate=one_for_all)
        losses[f"{name}, after {words:,} words"] = {unseen: lm.loss(adapted, unseen)}
    tuned.save_pretrained(output / "fine_tuned")

    show(losses, unseen)
    console.print(f"adapters in {output}: mad_g (the hypernetwork), generated, fine_tuned (the generated one)")
    if plot is not None:
        plot_losses(losses, unseen, plot)
        console.print(f"the losses of every language: {plot}")


if __name__ == "__main__":
    run(main)
