"""The model card: its text, where it is put, and what it keeps."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from peft_sparse.checkpoints import card, native
from peft_sparse.core.delta import SparseDelta

QUERY, UP, NORM, EMBED = (
    "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.mlp.up_proj.weight",
    "model.layers.{}.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
)
COUNTS = {
    EMBED: 30,
    **{QUERY.format(i): 10 for i in range(3)},
    **{UP.format(i): 20 for i in range(3)},
    NORM.format(2): 1,
}
SIZES = {
    EMBED: 1000,
    **{QUERY.format(i): 100 for i in range(3)},
    **{UP.format(i): 400 for i in range(3)},
    NORM.format(2): 10,
}
CONFIG = {
    "method": "lottery_ticket",
    "density": 0.05,
    "density_of": "targets",
    "budget": "global",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some-lab/tiny-llama",
    "modules_to_save": ["score"],
    "counts": COUNTS,
}


def test_layer_table():
    assert card.layer_table(COUNTS, SIZES) == "\n".join(
        [
            "| layer | embeddings | attention | feed-forward | norm | all |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            "| outside the layers | 30 (3.00%) |  |  |  | 30 (3.00%) |",
            "| `model.layers.0` to `1`, each |  | 10 (10.00%) | 20 (5.00%) |  | 30 (6.00%) |",
            "| `model.layers.2` |  | 10 (10.00%) | 20 (5.00%) | 1 (10.00%) | 31 (6.08%) |",
            "| total | 30 (3.00%) | 30 (10.00%) | 60 (5.00%) | 1 (10.00%) | 121 (4.82%) |",
        ]
    )


def test_layer_table_without_sizes_and_with_two_stacks():
    counts = {"decoder.block.0.mlp.weight": 1, "encoder.block.0.mlp.weight": 1200, "encoder.block.2.mlp.weight": 1200}
    assert card.layer_table(counts).splitlines()[2:] == [
        "| `decoder.block.0` | 1 | 1 |",
        "| `encoder.block.0` | 1,200 | 1,200 |",
        "| `encoder.block.2` | 1,200 | 1,200 |",
        "| total | 2,401 | 2,401 |",
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"rank": 0.9, "residual_density": 0.05, "denoise_embeddings": False},
            "rank 0.9 (of the squared singular values of each matrix), residual density 0.05, embeddings as they were",
        ),
        (
            {"rank": 64, "residual_density": 0.0, "denoise_embeddings": True},
            "rank 64 (directions of each matrix), residual density 0.0, embeddings too",
        ),
    ],
)
def test_a_deft_x_card_says_how_it_denoised(fields, text):
    lines = card.card_text({**CONFIG, "method": "deft_x", **fields}).splitlines()
    assert f"- Denoised before the choice: {text}" in lines
    assert not any("Denoised" in line for line in card.card_text(CONFIG).splitlines())


def test_card_text_starts_with_code_that_loads():
    lines = card.card_text(CONFIG, sizes=SIZES).splitlines()
    assert lines[0] == "```python"
    assert lines[1].startswith("import peft_sparse ")
    assert lines[2] == "from peft import PeftModel"
    code = "\n".join(lines[1 : lines.index("```")])
    compile(code, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("some-lab/tiny-llama")' in code
    assert [line for line in lines if line.startswith("- ")] == [
        "- Method: `lottery_ticket`",
        "- Density: 0.05 of the weights of the targeted tensors",
        "- Budget: `global`",
        "- Tuned weights: 121 in 8 tensors, 4.82% of their elements",
        "- Trained whole and saved with it: `score`",
    ]
    assert card.layer_table(COUNTS, SIZES).splitlines() == lines[-6:]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"density": 0.1, "density_of": "model"}, "- Density: 0.1 of the weights of the model"),
        ({"density": None, "num_weights": 5000}, "- Density: 5,000 weights"),
        ({"density": None, "equivalent_rank": 8}, "- Density: as many weights as LoRA of rank 8"),
        ({"budget": {".*attn.*": 0.75, ".*mlp.*": 0.25}}, "- Budget: `.*attn.*`: 75.00%, `.*mlp.*`: 25.00%"),
        ({"modules_to_save": None}, "- Tuned weights: 121 in 8 tensors"),
    ],
)
def test_card_text_names_the_request(fields, line):
    assert line in card.card_text({**CONFIG, **fields}).splitlines()


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("some-lab/tiny", ["base_model:adapter:some-lab/tiny"]),
        ("/data/tiny", []),
        ("./tiny", []),
        (None, []),
        ("a/b/c", []),
    ],
)
def test_card_tags(name, tags):
    found = card.card_tags({**CONFIG, "base_model_name_or_path": name})
    assert found == ["peft-sparse", "sparse-fine-tuning", "lottery-ticket", *tags]


# ---- the writer ---------------------------------------------------------------------------------


def read(folder):
    return (folder / "README.md").read_bytes().decode()


def test_update_card_makes_one(tmp_path):
    card.update_card(tmp_path, CONFIG, sizes=SIZES)
    found = ModelCard(read(tmp_path))
    assert found.data.tags == sorted(card.card_tags(CONFIG))
    assert found.data.base_model == "some-lab/tiny-llama"
    assert found.data.library_name == "peft"
    body = found.text.strip().splitlines()
    assert body[1:4] == ["```python", body[2], "from peft import PeftModel"]
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_update_card_keeps_what_others_wrote_and_can_be_repeated(tmp_path):
    original = "---\nlicense: mit\ntags:\n- mine\nbase_model: other/base\n---\n\n# My adapter\n\nMy own words.\n"
    (tmp_path / "README.md").write_bytes(original.encode())
    card.update_card(tmp_path, CONFIG, sizes=SIZES)
    once = read(tmp_path)
    assert once.endswith("<!-- peft-sparse:end -->\n\n# My adapter\n\nMy own words.\n")
    found = ModelCard(once)
    assert found.data.license == "mit"
    assert found.data.base_model == "other/base"
    assert set(found.data.tags) == {"mine", *card.card_tags(CONFIG)}
    card.update_card(tmp_path, CONFIG, sizes=SIZES)
    assert read(tmp_path) == once
    edited = once.replace("My own words.", "Other words.").replace("Budget: `global`", "Budget: changed by hand")
    (tmp_path / "README.md").write_bytes(edited.encode())
    card.update_card(tmp_path, {**CONFIG, "budget": "uniform"}, sizes=SIZES)
    assert read(tmp_path) == once.replace("My own words.", "Other words.").replace(
        "Budget: `global`", "Budget: `uniform`"
    )


def test_update_card_keeps_line_ends_and_place(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\nAbove.\r\n")
    card.update_card(tmp_path, CONFIG)
    assert read(tmp_path).count("\r\n") == read(tmp_path).count("\n")
    body = ModelCard(read(tmp_path)).text
    begin, end = (
        body.index("<!-- peft-sparse:begin"),
        body.index("<!-- peft-sparse:end -->") + len("<!-- peft-sparse:end -->"),
    )
    block, rest = body[begin:end], body[end:].strip()
    (tmp_path / "README.md").write_bytes(f"---\r\nlicense: mit\r\n---\r\n{rest}\r\n\r\n{block}\r\nBelow.\r\n".encode())
    card.update_card(tmp_path, {**CONFIG, "budget": "uniform"})
    moved = ModelCard(read(tmp_path)).text
    assert moved.index("Above.") < moved.index("Budget: `uniform`") < moved.index("Below.")
    assert moved.count("peft-sparse:begin") == 1


def test_named_adapters_get_their_own_card_and_a_part_of_the_root_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Words\n")
    for name in ("french", "german"):
        (tmp_path / name).mkdir()
        card.update_card(tmp_path / name, CONFIG, adapter_name=name)
        assert "subfolder" not in read(tmp_path / name)
        assert "import peft_sparse" in read(tmp_path / name)
    assert re.findall(r'subfolder="(\w+)"', read(tmp_path)) == ["german", "french"]
    card.update_card(tmp_path, CONFIG)
    body = ModelCard(read(tmp_path)).text
    assert body.strip().startswith(
        "<!-- peft-sparse:begin (saving writes this part anew) -->\n```python\nimport peft_sparse"
    )
    assert body.count("peft-sparse:end") == 3
    assert body.strip().endswith("# Words")
    before = read(tmp_path)
    card.update_card(tmp_path / "french", CONFIG, adapter_name="french")
    assert read(tmp_path) == before


def test_the_folder_above_is_left_alone_unless_it_holds_the_adapter(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\nWords\n")
    before = read(tmp_path)
    card.update_card(tmp_path / "checkpoint-5", CONFIG)
    card.update_card(tmp_path / "checkpoint-5", CONFIG, adapter_name="french")
    assert read(tmp_path) == before


def test_no_card_for_a_config_that_was_in_no_model(tmp_path):
    card.update_card(tmp_path, {**CONFIG, "counts": None})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"---\n- a list\n---\n", b"---\na: [1\n---\n", b"\xff\xfe\xfa", b"---\ntags: 5\n---\n"]
)
def test_a_card_that_cannot_be_read_is_kept_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "README.md").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        card.update_card(tmp_path, CONFIG)
    assert "was left as it is" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_failed_write_leaves_the_old_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nWords\n")
    monkeypatch.setattr(card.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        card.update_card(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert read(tmp_path) == "---\nlicense: mit\n---\nWords\n"


def test_sizes_come_from_the_file_if_it_is_of_these_counts(tmp_path):
    path = tmp_path / native.SOURCE
    assert card.sizes_in_file(path, {"a.weight": 2}) is None
    delta = SparseDelta(torch.tensor([1, 5], dtype=torch.int32), torch.ones(2), (4, 3))
    save_file(native.build({"a.weight": delta}, {"head.weight": torch.ones(2)}), path)
    assert card.sizes_in_file(path, {"a.weight": 2}) == {"a.weight": 12}
    assert card.sizes_in_file(path, {"a.weight": 3}) is None
    assert card.sizes_in_file(path, {"a.weight": 2, "b.weight": 1}) is None
    card.update_card(tmp_path, {**CONFIG, "counts": {"a.weight": 2}})
    assert "2 (16.67%)" in read(tmp_path)
    path.write_bytes(b"no file of ours")
    assert card.sizes_in_file(path, {"a.weight": 2}) is None
