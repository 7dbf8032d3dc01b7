"""A model and its tokenizer with fewer tokens: all that holds an id or has a row per token follows."""

from __future__ import annotations

import json
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from peft_sparse import ConfigError, FormatError
from peft_sparse.distillation import VocabularyRows, reduce_adapter, reduce_vocabulary
from tests.support.tokenizers import (
    KINDS,
    TEXTS,
    fast,
    ids_of,
    make,
    make_bert,
    make_llama,
    random_texts,
    unigram,
    word_piece,
)


@torch.no_grad()
def test_the_model_computes_the_same_on_counted_text(bert, reduced):
    model, tokenizer = bert
    for text in TEXTS:
        old, new = ids_of(tokenizer, text), ids_of(reduced.tokenizer, text)
        assert torch.equal(reduced.kept[new.input_ids], old.input_ids)
        hidden = model.bert(**old).last_hidden_state
        assert torch.equal(reduced.model.bert(**new).last_hidden_state, hidden)
        torch.testing.assert_close(reduced.model(**new).logits, model(**old).logits[..., reduced.kept])


def test_every_tensor_is_the_old_one_with_the_kept_rows(bert, reduced):
    model, _ = bert
    size = model.config.vocab_size
    old, new = model.state_dict(), reduced.model.state_dict()
    assert reduced.rows.tensors == {
        "bert.embeddings.word_embeddings.weight": 0,
        "cls.predictions.bias": 0,
        "cls.predictions.decoder.weight": 0,
        "cls.predictions.decoder.bias": 0,
    }
    assert reduced.tokens_after == len(reduced.kept) < reduced.tokens_before == size - 2
    for name, tensor in old.items():
        expected = tensor[reduced.kept] if name in reduced.rows.tensors else tensor
        assert torch.equal(new[name], expected), name
    assert reduced.model.cls.predictions.decoder.weight is reduced.model.bert.embeddings.word_embeddings.weight
    assert reduced.parameters_before == model.num_parameters()
    assert reduced.parameters_before - reduced.parameters_after == (size - len(reduced.kept)) * (16 + 1)
    assert reduced.bytes_before - reduced.bytes_after == 4 * (size - len(reduced.kept)) * (16 + 1)


def test_nothing_is_shared_and_nothing_given_changes(bert):
    model, tokenizer = bert
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spec, config = tokenizer.backend_tokenizer.to_str(), model.config.to_dict()
    small = reduce_vocabulary(model, tokenizer, texts=TEXTS)
    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (tokenizer.backend_tokenizer.to_str(), model.config.to_dict()) == (spec, config)


def test_sizes_and_ids_in_modules_and_configs(bert, reduced):
    model, _ = reduced.model, reduced.tokenizer
    count = len(reduced.kept)
    embeddings = model.bert.embeddings.word_embeddings
    decoder = model.cls.predictions.decoder
    assert (embeddings.num_embeddings, decoder.out_features, model.config.vocab_size) == (count, count, count)
    assert model.config.pad_token_id == embeddings.padding_idx == reduced.tokenizer.pad_token_id
    loss = model(**ids_of(reduced.tokenizer, TEXTS[0]), labels=ids_of(reduced.tokenizer, TEXTS[0]).input_ids).loss
    assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_by_transformers_tokenises_alike(kind, tmp_path):
    rng = random.Random(5)
    tokenizer = fast(make(kind, rng))
    texts = random_texts(rng, 3)
    small = reduce_vocabulary(make_bert(len(tokenizer)), tokenizer, texts={"a": texts[:2], "b": texts[2:]})
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        old = ids_of(tokenizer, text).input_ids[0]
        assert loaded.convert_ids_to_tokens(ids_of(loaded, text).input_ids[0]) == tokenizer.convert_ids_to_tokens(old)
    for role in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token"):
        assert getattr(loaded, role) == getattr(tokenizer, role), role
        old, new = (getattr(one, f"{role}_id") for one in (tokenizer, loaded))
        assert (None if new is None else int(small.kept[new])) == old, role
    assert set(small.sameness) == {"a", "b"}
    assert all(found.share == 1 for found in small.sameness.values())


def test_a_process_without_this_library_gets_the_same(interpreter, tmp_path, bert, reduced):
    model, tokenizer = bert
    reduced.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T; "
        "m, t = M.from_pretrained(sys.argv[1]).eval(), T.from_pretrained(sys.argv[1]); "
        "i = t('abab cdc aab', truncation=False, padding=False, return_tensors='pt'); "
        "torch.save(m(**i).logits.detach(), sys.argv[1] + '/logits'); assert 'peft_sparse' not in sys.modules"
    )
    interpreter.run(code, tmp_path)
    with torch.no_grad():
        expected = model(**ids_of(tokenizer, TEXTS[0])).logits[..., reduced.kept]
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_generates_the_same(tied):
    rng = random.Random(1)
    tokenizer = fast(make("byte BPE", rng))
    size = len(tokenizer)
    model = make_llama(size, tie_word_embeddings=tied, pad_token_id=1, bos_token_id=2, eos_token_id=[3, 70])
    model.generation_config.update(eos_token_id=[3, 70], suppress_tokens=[5, 80], bad_words_ids=[[9, 10], [300]])
    model.generation_config.lang_to_id = {"<|a|>": 200}
    small = reduce_vocabulary(model, tokenizer, texts=TEXTS, keep_tokens=iter([tokenizer.convert_ids_to_tokens(80)]))
    assert model.generation_config.lang_to_id == {"<|a|>": 200}
    del model.generation_config.lang_to_id
    new_id = {int(old): new for new, old in enumerate(small.kept)}
    assert small.model.config.eos_token_id == [3, new_id[70]] == small.model.generation_config.eos_token_id
    assert small.model.generation_config.lang_to_id == {"<|a|>": new_id[200]}
    del small.model.generation_config.lang_to_id
    assert small.model.generation_config.suppress_tokens == [new_id[old] for old in (5, 80) if old in new_id]
    kept_words = [[new_id[one] for one in word] for word in ([9, 10], [300]) if set(word) <= set(new_id)]
    assert small.model.generation_config.bad_words_ids == (kept_words or None)
    assert (small.model.lm_head.weight is small.model.model.embed_tokens.weight) is tied
    assert torch.equal(small.model.lm_head.weight, model.lm_head.weight[small.kept])
    inputs = ids_of(small.tokenizer, TEXTS[0]).input_ids
    with torch.no_grad():
        new, old = small.model(inputs).logits, model(small.kept[inputs]).logits
    torch.testing.assert_close(new, old[..., small.kept])


def test_the_size_of_the_vocabulary_may_be_that_of_other_things(tmp_path):
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{one}" for one in "abcdefgh")]
    tokens = [*letters, *(f"word{number}" for number in range(32 - len(letters)))]
    made = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.add_special_tokens(tokens[:5])
    model = make_bert(32, intermediate_size=32, max_position_embeddings=32, type_vocab_size=32, hidden_size=32)
    small = reduce_vocabulary(model, fast(made), texts=["abc"])
    assert small.rows.tensors.keys() == {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    assert small.model.config.intermediate_size == small.model.config.type_vocab_size == 32
    config = LoraConfig(r=2, target_modules=["word_embeddings", "decoder"], init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    tuned.save_pretrained(tmp_path / "whole", save_embedding_layers=False)
    reduce_adapter(tmp_path / "whole", tmp_path / "small", vocabulary=small)
    served = PeftModel.from_pretrained(small.model, tmp_path / "small").eval()
    ids = ids_of(small.tokenizer, "abc").input_ids
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, tuned(small.kept[ids]).logits[..., small.kept])


def test_a_pad_id_that_positions_are_counted_from_stays():
    tokens = [("first", -1.0), ("second", -1.0), ("<pad>", -1.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokens += [(one, -2.0) for one in "▁abcd"] + [("▁abab", -1.0), ("dcdc", -1.0)]
    made = Tokenizer(models.Unigram(tokens, unk_id=5))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = XLMRobertaConfig(vocab_size=13, pad_token_id=2, bos_token_id=3, eos_token_id=4, **sizes)
    model = XLMRobertaForMaskedLM(config).eval()
    small = reduce_vocabulary(model, fast(made), texts=["abab cd"])
    assert small.kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    batch, old = (
        tokenizer(["abab cd", "ab"], padding=True, return_tensors="pt") for tokenizer in (small.tokenizer, fast(made))
    )
    with torch.no_grad():
        logits = model(**old).logits
        torch.testing.assert_close(small.model(**batch).logits, logits[..., small.kept])


@pytest.mark.parametrize("tied", [True, False])
def test_encoders_and_decoders_follow_alike(tied):
    tokenizer = fast(unigram(random.Random(8)))
    size = len(tokenizer) + 3
    special = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": size - 1, "tie_word_embeddings": tied}
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **special)
    ).eval()
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, forced_eos_token_id=2, bos_token_id=0,
            **special,
        )
    ).eval()  # fmt: skip
    bart.final_logits_bias.normal_()
    for model in (t5, bart):
        small = reduce_vocabulary(model, tokenizer, texts=TEXTS)
        assert size - 1 in small.kept.tolist()  # no token has it, but the config does
        assert small.kept[small.model.config.decoder_start_token_id] == size - 1
        assert small.kept[small.model.generation_config.decoder_start_token_id] == size - 1
        ids = ids_of(small.tokenizer, TEXTS[0]).input_ids
        with torch.no_grad():
            new = small.model(input_ids=ids, labels=ids)
            old = model(input_ids=small.kept[ids], labels=small.kept[ids])
        torch.testing.assert_close(new.logits, old.logits[..., small.kept])
        shared = small.model.get_input_embeddings().weight
        assert (small.model.lm_head.weight is shared) is (model.lm_head.weight is model.get_input_embeddings().weight)


def test_a_classifier_and_a_bare_encoder_follow():
    tokenizer = fast(word_piece(random.Random(3)))
    for cls in (BertForSequenceClassification, BertModel):
        model = make_bert(len(tokenizer), cls=cls)
        small = reduce_vocabulary(model, tokenizer, texts=TEXTS)
        with torch.no_grad():
            old, new = model(**ids_of(tokenizer, TEXTS[0])), small.model(**ids_of(small.tokenizer, TEXTS[0]))
        assert all(torch.equal(one, other) for one, other in zip(old.to_tuple(), new.to_tuple(), strict=True))


def test_conv1d_and_gpt2s_own_names():
    tokenizer = fast(make("byte BPE", random.Random(4)))
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
        )
    ).eval()
    small = reduce_vocabulary(model, tokenizer, texts=TEXTS)
    ids = ids_of(small.tokenizer, TEXTS[1]).input_ids
    with torch.no_grad():
        torch.testing.assert_close(small.model(ids).logits, model(small.kept[ids]).logits[..., small.kept])


# What is counted


def test_thresholds_drop_rare_tokens_and_say_so(bert):
    texts = {"often": ["abab"] * 50, "rare": ["abab", "dcba cdc"]}
    whole = reduce_vocabulary(*bert, texts=texts)
    frequent = reduce_vocabulary(*bert, texts=texts, min_count=2)
    assert set(frequent.kept.tolist()) < set(whole.kept.tolist())
    assert (frequent.sameness["often"].same, frequent.sameness["often"].texts) == (50, 50)
    assert (frequent.sameness["rare"].same, frequent.sameness["rare"].texts) == (1, 2)
    assert frequent.sameness["rare"].first == "dcba cdc"
    assert frequent.sameness["rare"].share == 0.5
    kept = reduce_vocabulary(*bert, texts=texts, min_count=2, keep_texts=["dcba cdc"])
    assert kept.kept.tolist() == whole.kept.tolist()
    # A fifth of the tokens of one language is enough.
    shared = reduce_vocabulary(*bert, texts=texts, min_probability=0.2)
    assert set(frequent.kept.tolist()) <= set(shared.kept.tolist())


def test_words_and_truncation(bert):
    model, tokenizer = bert[0], fast(word_piece(random.Random(3)))
    text = "abab cdc aab dcba abba cc dd bdb"  # its tokenizer.json truncates at 4
    small = reduce_vocabulary(model, tokenizer, texts=[text, ["dcba", "cdc"]])
    assert small.sameness["texts"].tokens_before > 8
    spec = json.loads(small.tokenizer.backend_tokenizer.to_str())
    assert spec["truncation"]["max_length"] == 4
    assert torch.equal(small.kept[ids_of(small.tokenizer, text).input_ids], ids_of(tokenizer, text).input_ids)


def test_characters_may_go_where_bytes_stand_in():
    rng = random.Random(6)
    tokenizer = fast(make("byte-fallback BPE", rng))
    model = make_llama(len(tokenizer), pad_token_id=1)
    small = reduce_vocabulary(model, tokenizer, texts=["aaa"], keep_characters=False)
    tokens = set(small.tokenizer.get_vocab())
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= tokens
    assert not {"b", "c", "d"} & tokens
    assert small.tokenizer.tokenize("b") == ["<0x62>"]
    wordpiece = fast(word_piece(rng))
    with pytest.raises(ConfigError, match="keep_characters=False needs a tokenizer that writes unknown characters in"):
        reduce_vocabulary(make_bert(len(wordpiece)), wordpiece, texts=["ab"], keep_characters=False)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"texts": "abab"}, r"texts must be a list of texts or \{language: texts\}, got one text: write \[text\]"),
        ({"texts": {"ind": "abab"}}, r"texts\['ind'\] must be a list of texts"),
        ({"texts": [3]}, "number 0 of 'texts' must be a text or a list of words: 3"),
        ({"texts": []}, "texts must hold at least one text, got none"),
        ({"texts": {"a": iter([])}}, "An iterator may have been used up"),
        ({"texts": {"ind": TEXTS, "jav": [""]}}, "texts must hold at least one text of 'jav', got none"),
        ({"min_count": 0}, "min_count must be a whole number >= 1, got 0"),
        ({"min_count": True}, "min_count must be a whole number >= 1, got True"),
        ({"min_probability": 1.0}, r"min_probability must be in \[0, 1\), got 1.0"),
        ({"keep_tokens": ["[CLSS]"]}, r"no token '\[CLSS\]'\. Did you mean '\[CLS\]'\?"),
        ({"keep_tokens": "abc"}, r"keep_tokens must be a list of tokens, got one: write \['abc'\]"),
    ],
)
def test_bad_settings_are_refused_by_name(bert, changes, match):
    with pytest.raises(ConfigError, match=match):
        reduce_vocabulary(*bert, **{"texts": TEXTS, **changes})


def test_models_that_cannot_follow_are_refused_by_name(bert):
    model, tokenizer = bert
    adapted = get_peft_model(make_bert(40), LoraConfig(target_modules=["query"]))
    for one in (adapted, adapted.base_model.model):
        with pytest.raises(ConfigError, match="model must be the base model without adapters"):
            reduce_vocabulary(one, tokenizer, texts=TEXTS)
    with pytest.raises(ConfigError, match="model must be a model of transformers"):
        reduce_vocabulary(torch.nn.Linear(2, 2), tokenizer, texts=TEXTS)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        reduce_vocabulary(model, object(), texts=TEXTS)


def test_a_text_that_would_change_is_an_error(bert, monkeypatch):
    model, tokenizer = bert
    monkeypatch.setattr("peft_sparse.distillation.vocabulary.with_ancestors", lambda spec, used: set())
    with pytest.raises(ConfigError, match=r"1 of 1 texts of 'ind' would be tokenised differently.*'abab cdc'"):
        reduce_vocabulary(model, tokenizer, texts={"ind": ["abab cdc"]})


def test_the_file_of_rows_is_checked(reduced, tmp_path):
    reduced.rows.save(tmp_path)
    loaded = VocabularyRows.load(tmp_path)
    assert torch.equal(loaded.kept, reduced.kept)
    assert (loaded.old_size, loaded.tensors) == (reduced.rows.old_size, dict(reduced.rows.tensors))
    VocabularyRows(torch.tensor([0, 0]), 5, {}).save(tmp_path)
    with pytest.raises(FormatError, match="rows twice"):
        VocabularyRows.load(tmp_path)
    (tmp_path / "reduced_vocabulary.safetensors").write_bytes(b"no tensors")
    with pytest.raises(FormatError, match="is damaged"):
        VocabularyRows.load(tmp_path)


def test_a_model_of_the_hub_with_chat_template_keeps_it(tmp_path):
    tokenizer = fast(make("byte BPE", random.Random(9)))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    small = reduce_vocabulary(make_llama(len(tokenizer), pad_token_id=1), tokenizer, texts=TEXTS)
    small.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(loaded)
