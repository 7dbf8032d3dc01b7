"""On real classes: an adapter in a model computes what the merged model computes, and every weight of it is trained."""

from __future__ import annotations

import pytest

from peft_sparse import AdaSftConfig, RandConfig
from tests.support.architectures import build, check, model_classes

KINDS = {
    "all-linear": lambda: RandConfig(density=0.3, target_modules="all-linear", init_weights=False),
    "all": lambda: RandConfig(density=0.3, target_modules="all", init_weights=False),
    "ada": lambda: AdaSftConfig(target_modules="all-linear", init_weights=False),
}
# Parents that read weights themselves (Mamba, MobileBERT, BLOOM, DeBERTa), layers whose attributes are read
# (MobileNetV2, ProphetNet), norms and positions with forwards of their own, and an ordinary decoder.
SAMPLE = ["MambaModel", "MobileBertForMaskedLM", "DebertaV2Model", "MobileNetV2Model", "ProphetNetModel", "Gemma2Model"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample(name, kind):
    if name == "MobileNetV2Model" and kind != "all":
        pytest.skip("it has no linear layers")
    base = build(name)
    assert base is not None
    finding = check(base, KINDS[kind]())
    assert (finding.outcome, finding.why) == ("right", "")
    assert finding.deltas


@pytest.mark.slow
@pytest.mark.parametrize("name", model_classes())
def test_every_class(name):
    base = build(name)
    if base is None:
        pytest.skip("is not built small by these rules")
    for kind, config in KINDS.items():
        finding = check(base, config())
        assert finding.outcome in ("right", "refused"), f"{kind}: {finding.why}"
