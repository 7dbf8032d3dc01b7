"""PEFT's template of a card: what nobody filled in goes, every word of a user's stays."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard, ModelCardData
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_sparse import AdaSftConfig, BottleneckConfig, RandConfig
from peft_sparse.checkpoints.card_template import without_empty_sections
from tests.support.models import llama

TEMPLATE = ModelCard.from_template(ModelCardData()).text


def test_nothing_of_the_template_stays():
    assert without_empty_sections(TEMPLATE).strip() == ""


def test_what_was_filled_in_stays_with_the_headings_above_it():
    license_line = "- **License:** [More Information Needed]"
    text = TEMPLATE.replace(license_line, "- **License:** apache-2.0").replace(
        "#### Preprocessing [optional]", "#### Preprocessing [optional]\n\n```bash\n# lower case\n```"
    )
    found = without_empty_sections(text)
    assert [line for line in found.splitlines() if line.startswith("#")] == [
        "## Model Details",
        "### Model Description",
        "## Training Details",
        "### Training Procedure",
        "#### Preprocessing [optional]",
        "# lower case",
    ]
    assert "- **License:** apache-2.0" in found


def test_a_card_of_ones_own_is_left_alone():
    text = "# Mine\n\n## Empty\n\n## Notes\n<!-- a comment -->\n- **Model:**\n"
    assert without_empty_sections(text) == text
    assert without_empty_sections("Above.\n" + TEMPLATE).strip() == "Above."


@pytest.mark.parametrize("config", [RandConfig(density=0.1), AdaSftConfig(), BottleneckConfig(bottleneck_size=4)])
def test_a_saved_card_names_no_folder_and_has_no_empty_section(tmp_path, config):
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "private" / "base-model")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "private" / "base-model")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    card = ModelCard((tmp_path / "adapter" / "README.md").read_text())
    assert str(tmp_path) not in str(card)
    assert 'from_pretrained("base-model")  # a folder: the model it was trained on' in card.text
    assert card.data.base_model is None
    assert not [tag for tag in card.data.tags if tag.startswith("base_model")]
    assert "More Information Needed" not in card.text
    assert [line for line in card.text.splitlines() if line.startswith("#")][-1] == "### Framework versions"
