"""The biaffine parser: its scores and loss against loops in float64, its files, its adapters."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    DistilBertConfig,
    LlamaConfig,
    ModernBertConfig,
    T5Config,
    Trainer,
    TrainingArguments,
    XLMRobertaConfig,
)

from peft_sparse import (
    BiaffineParser,
    LotteryTicketConfig,
    ParserCollator,
    RandConfig,
    SparseTrainer,
    attachment_scores,
    encode_sentences,
    merge_checkpoint,
)
from peft_sparse.errors import ConfigError
from peft_sparse.parsing import attachment_metrics, maximum_spanning_tree
from peft_sparse.parsing.parser import Biaffine
from tests.support.parsers import LABELS, encoder, parser, sentences, tokenizer

LABEL2ID = {name: i for i, name in enumerate(LABELS)}
ADAPTER = {"density": 0.2, "target_modules": "all", "modules_to_save": list(BiaffineParser.HEADS)}


def rows(count: int, *, seed: int = 0) -> list[dict]:
    return encode_sentences(tokenizer(), sentences(count, seed=seed), label2id=LABEL2ID)[0]


def batch(count: int = 6, *, seed: int = 0) -> dict[str, torch.Tensor]:
    return ParserCollator(tokenizer())(rows(count, seed=seed))


def by_loops(model, inputs: dict, *, pooled: bool = False, roots: bool = True):
    """(arc scores, relation scores at any head, loss) of each sentence by itself, in float64, word by word."""
    arcs_weight, rels_weight = model.biaffine_arcs.weight.double(), model.biaffine_rels.weight.double()
    one = torch.ones(1, dtype=torch.float64)
    arc_scores, relation_scores, arc_losses, relation_losses = [], [], [], []
    for row in range(len(inputs["input_ids"])):
        length = int(inputs["attention_mask"][row].sum())
        encoded = model.base_model(input_ids=inputs["input_ids"][row : row + 1, :length])
        states = encoded.last_hidden_state[0].double()
        root = encoded.pooler_output[0].double() if pooled else states[0]
        count = int(inputs["word_ids"][row].max()) + 1
        places = inputs["word_ids"][row].tolist()
        words = [torch.stack([states[t] for t in range(length) if places[t] == word]).mean(0) for word in range(count)]
        heads = [root, *words]
        arcs = torch.stack([torch.stack([torch.cat([d, one]) @ arcs_weight[0] @ h for h in heads]) for d in words])
        relations = torch.stack(
            [
                torch.stack(
                    [torch.stack([torch.cat([d, one]) @ w @ torch.cat([h, one]) for w in rels_weight]) for h in heads]
                )
                for d in words
            ]
        )
        arc_scores.append(arcs)
        relation_scores.append(relations)
        for word in range(count):
            head, relation = (int(inputs[name][row, word]) for name in ("labels_arcs", "labels_rels"))
            if head == 0 and not roots:
                continue
            arc_losses.append(torch.logsumexp(arcs[word], 0) - arcs[word, head])
            relation_losses.append(torch.logsumexp(relations[word, head], 0) - relations[word, head, relation])
    return arc_scores, relation_scores, torch.stack(arc_losses).mean() + torch.stack(relation_losses).mean()


@pytest.mark.parametrize("root", ["cls", "pooled"])
@pytest.mark.parametrize("roots", [True, False])
def test_scores_loss_and_parses_are_those_of_loops(root, roots):
    model, inputs = parser(root=root, roots=roots), batch()
    with torch.no_grad():
        out = model(**inputs, output_scores=True)
        arcs, relations, loss = by_loops(model, inputs, pooled=root == "pooled", roots=roots)
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-5)
    for row, (own, own_relations) in enumerate(zip(arcs, relations, strict=True)):
        n = len(own)
        torch.testing.assert_close(out.arc_scores[row, :n, : n + 1].double(), own, rtol=1e-4, atol=1e-5)
        assert (out.arc_scores[row, :n, n + 1 :] == -math.inf).all()
        best = own.argmax(1)
        assert out.arcs[row, :n].tolist() == best.tolist()
        chosen = own_relations[torch.arange(n), best]
        torch.testing.assert_close(out.relation_scores[row, :n].double(), chosen, rtol=1e-4, atol=1e-5)
        assert out.relations[row, :n].tolist() == chosen.argmax(1).tolist()
        assert (out.arcs[row, n:] == -100).all()
        assert (out.relations[row, n:] == -100).all()


def test_roots_false_is_the_published_loss_and_differs():
    inputs = batch()
    losses = {roots: float(parser(roots=roots)(**inputs).loss.detach()) for roots in (True, False)}
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)
    only_root = batch()
    only_root["labels_arcs"][only_root["labels_arcs"] > 0] = -100
    assert float(parser(roots=False)(**only_root).loss.detach()) == 0


def test_all_pairs_are_scored_as_each_pair_is():
    torch.manual_seed(0)
    product = Biaffine(5, 3, bias_x=True, bias_y=True)
    nn.init.normal_(product.weight)
    x, y = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    everything = product(x, y)
    assert everything.shape == (2, 3, 4, 4)
    torch.testing.assert_close(everything.diagonal(dim1=2, dim2=3).transpose(1, 2), product.pairwise(x, y))


def test_padding_changes_nothing():
    model = parser()
    alone, together = batch(1), batch(6)
    width = alone["input_ids"].shape[1]
    assert together["input_ids"].shape[1] > width or together["labels_arcs"].shape[1] > alone["labels_arcs"].shape[1]
    with torch.no_grad():
        own, of_batch = (model(**inputs, output_scores=True) for inputs in (alone, together))
    n = alone["labels_arcs"].shape[1]
    torch.testing.assert_close(own.arc_scores[0], of_batch.arc_scores[0, :n, : n + 1], rtol=1e-4, atol=1e-5)
    assert own.arcs[0].tolist() == of_batch.arcs[0, :n].tolist()


@pytest.mark.parametrize("root", ["cls", "pooled"])
def test_left_padding_moves_the_root(root):
    model, words = parser(root=root), tokenizer()
    right = ParserCollator(words)(rows(6))
    words.padding_side = "left"
    left = ParserCollator(words)(rows(6))
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        one, other = (
            model(**inputs, **extra, output_scores=True).arc_scores
            for inputs, extra in ((right, {}), (left, {"position_ids": positions}))
        )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_tree_is_decoded_on_demand_and_by_config():
    model, inputs = parser(heads=1.0), batch(20)
    with torch.no_grad():
        greedy, tree = model(**inputs, output_scores=True), model(**inputs, decode="mst")
        by_config = parser(heads=1.0, decode="mst")(**inputs)
    assert not torch.equal(greedy.arcs, tree.arcs)
    assert torch.equal(tree.arcs, by_config.arcs)
    for row, heads in enumerate(tree.arcs.tolist()):
        own = [head for head in heads if head != -100]
        assert own == maximum_spanning_tree(greedy.arc_scores[row, : len(own), : len(own) + 1].numpy())
        assert own.count(0) == 1
    with pytest.raises(ConfigError, match=r"decode must be one of .*got 'best'"):
        model(**inputs, decode="best")


@pytest.mark.parametrize("decode", ["greedy", "mst"])
def test_scores_that_are_no_numbers_give_no_parse(decode):
    model = parser()
    torch.nn.init.constant_(model.biaffine_arcs.weight, float("nan"))
    with pytest.raises(ConfigError, match="the scores of heads are NaN"):
        model(**batch(), decode=decode)


def test_a_pretrained_encoder_gets_heads_at_zero_and_comes_back_from_its_folder(tmp_path):
    encoder().save_pretrained(tmp_path / "encoder")
    made = BiaffineParser.from_pretrained(tmp_path / "encoder")
    assert isinstance(made, BiaffineParser)
    assert (type(made).__name__, made.config.num_labels) == ("BertBiaffineParser", 38)
    assert {name: tuple(p.shape) for name, p in made.named_parameters() if name.startswith("biaffine")} == {
        "biaffine_arcs.weight": (1, 17, 16),
        "biaffine_rels.weight": (38, 17, 17),
    }
    assert not any(p.any() for name, p in made.named_parameters() if name.startswith("biaffine"))
    for name, tensor in encoder().state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(made.state_dict()[f"bert.{name}"], tensor)

    model, inputs = parser(root="pooled", decode="mst", roots=False), batch()
    model.save_pretrained(tmp_path / "parser")
    again = BiaffineParser.from_pretrained(tmp_path / "parser").eval()
    assert again.config.biaffine_parser == {"root": "pooled", "decode": "mst", "roots": False}
    assert list(again.config.id2label.values()) == LABELS
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, again(**inputs).loss)
        assert torch.equal(model(**inputs).arcs, again(**inputs).arcs)
    with pytest.raises(ConfigError, match=r"labels: the saved parser has \['det'.*, got \['root'"):
        BiaffineParser.from_pretrained(tmp_path / "parser", labels=LABELS[::-1])
    assert BiaffineParser.from_pretrained(tmp_path / "parser", labels=LABELS).config.label2id["root"] == 3
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "parser").embeddings.word_embeddings.weight,
        model.bert.embeddings.word_embeddings.weight,
    )


def test_a_pickled_parser_is_read_in_a_new_process(interpreter, tmp_path):
    (tmp_path / "parser.pkl").write_bytes(pickle.dumps(parser()))
    code = f"import pickle; print(type(pickle.load(open({str(tmp_path / 'parser.pkl')!r}, 'rb'))).__name__)"
    assert interpreter.run(code).stdout.strip() == "BertBiaffineParser"


SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TWO_LAYERS = {**SMALL, "num_hidden_layers": 2}
FAMILIES = [
    XLMRobertaConfig(**SMALL),
    # Two layers: with one, which has one of its two kinds of attention, transformers 5.6 refuses its own defaults.
    ModernBertConfig(**TWO_LAYERS, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1),
    DistilBertConfig(vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=16),
    LlamaConfig(**SMALL),
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_other_encoders_and_decoders_parse(config):
    model = BiaffineParser.from_config(config, labels=LABELS)
    inputs = batch()
    loss = model(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).loss
    counts = (inputs["labels_arcs"] != -100).sum(1)
    # Heads start at zero: every head and every relation is as likely.
    expected = (counts * torch.log(counts + 1.0)).sum() / counts.sum() + math.log(len(LABELS))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert model.biaffine_arcs.weight.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiaffineParser.from_config(T5Config()), "T5Config is of another kind"),
        (lambda: BiaffineParser.from_config(FAMILIES[3], root="pooled"), "LlamaModel has none"),
        (lambda: parser(root="mean"), "root must be one of .*got 'mean'"),
        (lambda: parser(labels=["a", "a"]), "labels must be a list of different names"),
        (lambda: parser(labels="det"), "labels must be a list of different names"),
        (lambda: BiaffineParser.from_pretrained("x", num_labels=3), "num_labels is not taken: labels="),
    ],
)
def test_what_makes_no_parser_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word_ids": None}, "a batch needs word_ids"),
        ({"labels_rels": None}, "a batch needs word_ids, and labels_arcs and labels_rels together"),
        ({"labels_arcs": torch.zeros(6, 2, dtype=torch.long)}, r"labels_arcs must be \[batch, words\]"),
        ({"labels_arcs": torch.full((6, 5), 0)}, "with -100 where there is no word"),
        ({"word_ids": torch.full((6, 12), -1)}, "name at least one word"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    inputs = batch()
    assert len(set((inputs["labels_arcs"] != -100).sum(1).tolist())) > 1
    with pytest.raises(ConfigError, match=message):
        parser()(**{**inputs, **change})


def test_a_head_beyond_the_sentence_is_refused():
    inputs = batch()
    shortest = int((inputs["labels_arcs"] != -100).sum(1).argmin())
    inputs["labels_arcs"][shortest, 0] = inputs["labels_arcs"].shape[1]
    with pytest.raises(ConfigError, match="to the number of words of the sentence"):
        parser()(**inputs)


def arguments(folder, **fields) -> TrainingArguments:
    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 2e-2, "logging_steps": 1000}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **fields})


def test_a_sparse_task_adapter_learns_to_parse_and_is_an_adapter_like_any_other(tmp_path):
    base = encoder(1)
    base.save_pretrained(tmp_path / "base")
    model = BiaffineParser.from_pretrained(tmp_path / "base", labels=LABELS)
    tuned = get_peft_model(model, LotteryTicketConfig(**ADAPTER))
    held_out = rows(40, seed=9)
    trainer = SparseTrainer(
        model=tuned, args=arguments(tmp_path), train_dataset=rows(200, seed=1), eval_dataset=held_out,
        data_collator=ParserCollator(tokenizer()), compute_metrics=attachment_metrics,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_las"] > 0.9 > 0.6 > before["eval_las"]
    assert after["eval_uas"] >= after["eval_las"]
    inputs = batch(40, seed=9)
    tuned.eval()
    with torch.no_grad():
        expected = tuned(**inputs)
    gold = [(s["heads"], [LABEL2ID[r] for r in s["relations"]]) for s in sentences(40, seed=9)]
    counts = [len(heads) for heads, _ in gold]
    parses = [
        (heads[:n], relations[:n])
        for heads, relations, n in zip(expected.arcs.tolist(), expected.relations.tolist(), counts, strict=True)
    ]
    assert attachment_scores(parses, gold)["las"] == pytest.approx(after["eval_las"])

    tuned.save_pretrained(tmp_path / "adapter")
    fresh = BiaffineParser.from_pretrained(tmp_path / "base", labels=LABELS)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    merged = PeftModel.from_pretrained(
        BiaffineParser.from_pretrained(tmp_path / "base", labels=LABELS), tmp_path / "adapter"
    ).merge_and_unload()
    merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    on_disk = BiaffineParser.from_pretrained(tmp_path / "merged", labels=LABELS).eval()
    with torch.no_grad():
        for other in (loaded, merged.eval(), on_disk):
            found = other(**inputs)
            assert torch.equal(found.loss, expected.loss)
            assert torch.equal(found.arcs, expected.arcs)
            assert torch.equal(found.relations, expected.relations)


def test_a_language_adapter_goes_below_the_parser(tmp_path):
    encoder(1).save_pretrained(tmp_path / "base")
    language = get_peft_model(
        AutoModelForMaskedLM.from_pretrained(tmp_path / "base"),
        RandConfig(density=0.2, target_modules="all", init_weights=False, seed=3),
    )
    language.save_pretrained(tmp_path / "language")
    model = BiaffineParser.from_pretrained(tmp_path / "base", labels=LABELS)
    nn.init.normal_(model.biaffine_arcs.weight)
    tuned = get_peft_model(model, RandConfig(**ADAPTER, init_weights=False), adapter_name="task")
    tuned.load_adapter(tmp_path / "language", adapter_name="language")
    tuned.add_weighted_adapter(["language", "task"], [1.0, 1.0], "both", head_from="task")
    inputs = batch()
    scores = {}
    for name in ("task", "language", "both"):
        tuned.set_adapter(name)
        with torch.no_grad():
            scores[name] = tuned.eval()(**inputs, output_scores=True).arc_scores
    assert all(not torch.equal(scores[a], scores[b]) for a, b in itertools.combinations(scores, 2))


def test_auto_peft_model_finds_the_class(tmp_path):
    model = parser(root="pooled")
    model.save_pretrained(tmp_path / "parser")
    tuned = get_peft_model(BiaffineParser.from_pretrained(tmp_path / "parser"), RandConfig(**ADAPTER))
    tuned.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["peft_sparse.parsing.parser"])
    assert type(again.get_base_model()).__name__ == "BertBiaffineParser"
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).loss, tuned.eval()(**inputs).loss)


def test_a_plain_trainer_averages_over_micro_batches(tmp_path):
    seen = []

    class Watching(Trainer):
        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            seen.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    trainer = Watching(
        model=parser(),
        args=arguments(
            tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2
        ),
        train_dataset=rows(8),
        data_collator=ParserCollator(tokenizer()),
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(sum(seen) / 2, rel=1e-4)
