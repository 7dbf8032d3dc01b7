"""Memory plans: what can be counted is counted right, what a step takes is plausible, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from peft_sparse import (
    SM3,
    AdaSftConfig,
    BottleneckConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseAdamW,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    plan_memory,
    start_dense_phase,
)
from peft_sparse.core.backends import products, sddmm
from peft_sparse.errors import ConfigError
from peft_sparse.planning.fitting import fitting_methods, largest_density
from peft_sparse.planning.phases import PhaseMemory
from peft_sparse.selection.criteria import Criterion

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
LLAMA = LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"])
TIED = LlamaConfig(**SMALL, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
BERT = BertConfig(**SMALL, architectures=["BertForSequenceClassification"])
MODELS = {
    "llama": (LLAMA, LlamaForCausalLM),
    "tied": (TIED, LlamaForCausalLM),
    "bert": (BERT, BertForSequenceClassification),
}
REQUEST = {"density": 0.1, "target_modules": "all"}
ONE_PHASE = {
    "rand": RandConfig(**REQUEST),
    "rand, global": RandConfig(num_weights=77, budget="global", target_modules=["q_proj", "query"]),
    "bfloat16 values": RandConfig(**REQUEST, values_dtype="bfloat16"),
    "heads": RandConfig(density=0.1, target_modules=["q_proj", "query"], modules_to_save=["lm_head", "classifier"]),
    "spiel_ag": SpielAGConfig(**REQUEST, total_steps=100),
    "spiel_ma": SpielMAConfig(**REQUEST, total_steps=100),
}


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def states(optimizer) -> int:
    held = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return nbytes(t for t in held if t.dim())


def take_step(model: nn.Module, optimizer) -> None:
    ids = torch.arange(50).view(5, 10)
    labels = torch.zeros(5, dtype=torch.long) if model.config.model_type == "bert" else ids
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", ONE_PHASE)
@pytest.mark.parametrize("kind", MODELS)
def test_what_can_be_counted_is_what_a_real_training_holds(kind, name):
    config, model_class = MODELS[kind]
    method = ONE_PHASE[name]
    plan = plan_memory(config, method, batch_size=2, sequence_length=8)
    parts = plan.phases[0].parts
    base = model_class(config)
    assert parts["base weights"] == nbytes([*base.parameters(), *base.buffers()])
    model = get_peft_model(base, method)
    deltas = [delta for _, _, _, delta in iter_deltas(model)]
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "spiel_ma":
        optimizer = SM3(trained, deltas=deltas)
    else:
        optimizer = SparseAdamW(trained) if name == "spiel_ag" else AdamW(trained)
    take_step(model, optimizer)
    if name == "spiel_ag":
        for values in trained:
            optimizer.state[values]["age"] = torch.zeros_like(values, dtype=torch.int32)
    assert parts["adapter values"] == nbytes(delta.values for delta in deltas)
    assert parts["adapter indices"] == nbytes(delta.indices for delta in deltas)
    assert parts["optimizer states"] == states(optimizer)
    assert plan.phases[0].all_gradients == nbytes(p.grad for p in trained)
    assert plan.num_trained == sum(p.numel() for p in trained)
    assert plan.peak == max(phase.total for phase in plan.phases)


@pytest.mark.parametrize("kind", MODELS)
def test_a_dense_phase_holds_gradients_states_and_a_copy_of_its_targets(kind):
    config, model_class = MODELS[kind]
    method = LotteryTicketConfig(**REQUEST)
    plan = plan_memory(config, method, batch_size=2, sequence_length=8)
    dense, sparse = plan.phases
    assert (dense.name, sparse.name) == ("dense phase", "sparse phase")
    model = get_peft_model(model_class(config), method)
    with start_dense_phase(model) as phase:
        trained = [target.parameter for target in phase.targets]
        optimizer = AdamW(trained)
        take_step(model, optimizer)
        in_memory = nbytes([*(p for n, p in model.named_parameters() if "sparse_ft_" not in n),
                            *(b for n, b in model.named_buffers() if "sparse_ft_" not in n)])  # fmt: skip
        assert dense.parts["base weights"] == in_memory
        assert dense.parts["optimizer states"] == states(optimizer)
        assert dense.all_gradients == nbytes(p.grad for p in trained)
        assert dense.host == {"copy of the weights": nbytes(phase.originals.values())}
        phase.select()
    assert sparse.parts["adapter values"] == nbytes(delta.values for _, _, _, delta in iter_deltas(model))
    on_cpu = plan_memory(config, method, batch_size=2, sequence_length=8, device="cpu").phases[0]
    assert on_cpu.parts["copy of the weights"] == dense.host["copy of the weights"]
    assert on_cpu.host == {}


def test_a_config_of_peft_is_left_as_it_was():
    config = LoraConfig(r=2, target_modules="all-linear")
    for model in (LLAMA, BERT):
        plan_memory(model, config)
    assert config.target_modules == "all-linear"


def test_lora_and_full_fine_tuning():
    config = LoraConfig(r=2, target_modules="all-linear")
    plan = plan_memory(LLAMA, config, batch_size=2, sequence_length=8)
    model = get_peft_model(LlamaForCausalLM(LLAMA), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.method == "lora"
    assert plan.phases[0].parts["adapter"] == nbytes(trained)
    assert plan.phases[0].parts["optimizer states"] == 2 * nbytes(trained)
    assert plan.phases[0].parts["originals"] == 0
    full = plan_memory(LLAMA, batch_size=2, sequence_length=8)
    weights = nbytes(LlamaForCausalLM(LLAMA).parameters())
    assert (full.method, full.phases[0].parts["optimizer states"]) == ("full", 2 * weights)
    assert full.num_trained * 4 == weights


ACTIVATIONS = {
    "rand": RandConfig(density=0.1),
    # The input of B is of rank r, that of A is the layer's, which q, k and v share; dropout makes one for each of them.
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "lora on q alone": LoraConfig(r=2, target_modules=["q_proj"]),
    "lora with dropout": LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1),
    "bottleneck": BottleneckConfig(bottleneck_size=4),
    "masks": AdaSftConfig(),
}


@pytest.mark.parametrize(
    ("name", "checkpointing"), [*((name, False) for name in ACTIVATIONS), ("rand", True), ("lora", True)]
)
def test_activations_are_those_of_the_autograd_graph(name, checkpointing):
    """Against what torch saves in a real forward of the same model: each storage once, weights not."""
    config = ACTIVATIONS[name]
    plan = plan_memory(LLAMA, config, batch_size=3, sequence_length=20, device="cpu",
                       gradient_checkpointing=checkpointing)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, copy.deepcopy(config))
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(50, (3, 20))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    found = plan.phases[0].parts["activations"]
    if checkpointing:
        # torch's hooks do not see what the checkpoint keeps, the input of each layer.
        assert found < 0.5 * plan_memory(LLAMA, config, batch_size=3, sequence_length=20,
                                         device="cpu").phases[0].parts["activations"]  # fmt: skip
    else:
        assert 0.95 * sum(saved.values()) < found < 1.08 * sum(saved.values())


def test_the_masks_of_ada_sft_are_still_there_when_the_weights_under_them_train():
    masks, weights = plan_memory(BERT, AdaSftConfig(), sequence_length=8).phases
    assert (masks.name, weights.name) == ("mask phase", "weight phase")
    model = get_peft_model(BertForSequenceClassification(BERT), AdaSftConfig())
    trained = [p for p in model.parameters() if p.requires_grad]
    for phase, copies in ((masks, 1), (weights, 2)):
        assert phase.parts["adapter"] == copies * nbytes(trained)
        assert phase.parts["optimizer states"] == 2 * nbytes(trained)
    (only,) = plan_memory(BERT, AdaSftConfig(phase="weights"), sequence_length=8).phases
    assert only == weights


def test_a_weight_in_4_bits_is_dequantised_whole():
    wide = LlamaConfig(**{**SMALL, "intermediate_size": 2000}, architectures=["LlamaForCausalLM"])
    request = LoraConfig(r=1, target_modules=["q_proj"])
    plain, packed = (
        plan_memory(wide, request, sequence_length=1, load_in_4bit=flag).phases[0] for flag in (False, True)
    )
    whole = 4 * 16 * 2000
    assert plain.total - plain.parts["base weights"] < whole < packed.total - packed.parts["base weights"]


def test_what_depends_on_data_is_planned_for_data_that_asks_for_everything():
    for dtype in (torch.float32, torch.bfloat16):
        mixture = Qwen3MoeConfig(**SMALL, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                 moe_intermediate_size=16, architectures=["Qwen3MoeForCausalLM"])  # fmt: skip
        plan = plan_memory(mixture, sequence_length=8, dtype=dtype)
        # Every expert has a gradient, whatever the routing.
        assert plan.phases[0].all_gradients == plan.num_trained * dtype.itemsize
    deberta = DebertaV2Config(**SMALL, architectures=["DebertaV2ForSequenceClassification"])
    assert plan_memory(deberta, RandConfig(density=0.1), sequence_length=8).peak > 0
    # A model that knows no padding: its classifier takes no batch before somebody names a token.
    found = plan_memory(LLAMA, RandConfig(density=0.1), batch_size=2, sequence_length=8, task_type="SEQ_CLS")
    assert found.peak > 0
    assert LLAMA.pad_token_id is None


def test_options_change_what_they_should():
    def parts(**options) -> dict[str, int]:
        return dict(plan_memory(LLAMA, RandConfig(**REQUEST), **{"sequence_length": 16, **options}).phases[0].parts)

    plain = parts()
    assert 1.9 < parts(batch_size=8)["activations"] / parts(batch_size=4)["activations"] < 2.1
    assert parts(dtype=torch.bfloat16)["base weights"] == pytest.approx(plain["base weights"] / 2, rel=0.01)
    assert parts(dtype=torch.bfloat16)["adapter values"] == plain["adapter values"]
    assert parts(load_in_4bit=True)["base weights"] < 0.7 * plain["base weights"]
    assert parts(optimizer="sgd")["optimizer states"] == 0
    assert 0 < parts(optimizer="adamw_8bit")["optimizer states"] <= parts(optimizer="adamw")["optimizer states"]
    assert plain["gradients"] < parts(gradient_accumulation=True)["gradients"]
    assert parts(gradient_checkpointing=True)["activations"] < plain["activations"]


def test_a_window_of_spiel_ag_needs_more():
    training, window = plan_memory(LLAMA, SpielAGConfig(density=0.3), sequence_length=16).phases
    assert window.name == "estimating gradients"
    assert window.total > training.total
    # The whole gradient of a tuned embedding is larger than anything else here.
    big = LlamaConfig(**{**SMALL, "vocab_size": 5000}, architectures=["LlamaForCausalLM"])
    everything = SpielAGConfig(density=0.01, target_modules=["embed_tokens"])
    _, window = plan_memory(big, everything, sequence_length=4).phases
    assert window.parts["temporaries"] >= 2 * 4 * 5000 * 16


def test_encoder_decoder_models_and_models_without_a_loss():
    t5 = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0,
                  architectures=["T5ForConditionalGeneration"])  # fmt: skip
    assert plan_memory(t5, RandConfig(**REQUEST), sequence_length=8).peak > 0
    bare = copy.deepcopy(BERT)
    bare.architectures = ["BertModel"]
    assert plan_memory(bare, RandConfig(**REQUEST), sequence_length=8).peak > 0
    asked = plan_memory(bare, RandConfig(**REQUEST), sequence_length=8, task_type="QUESTION_ANS")
    assert asked.peak > 0


def test_names_that_transformers_gives_up_are_no_concern_of_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        plan_memory(LLAMA, LoraConfig(target_modules="all-linear"), sequence_length=4, gradient_checkpointing=True)


def test_planning_leaves_everything_as_it_was():
    attention, config = F.scaled_dot_product_attention, copy.deepcopy(LLAMA)
    plan_memory(LLAMA, RandConfig(density=0.1), sequence_length=8, gradient_checkpointing=True, device="cpu")
    assert F.scaled_dot_product_attention is attention
    assert config.to_dict() == LLAMA.to_dict()
    meta = torch.device("meta")
    assert not sddmm.prefer_sampled(1, (1000, 1000), device=meta)
    with products.meta_stands_for("cpu"):
        assert sddmm.prefer_sampled(1, (1000, 1000), device=meta)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
        ({"sequence_length": 1.5}, r"sequence_length must be an int >= 1, got 1\.5"),
        ({"optimizer": "lion"}, r"optimizer must be one of \['adamw', .*, got 'lion'"),
        ({"device": "tpu"}, r"device must be one of \['cuda', 'cpu'\], got 'tpu'"),
        ({"dtype": torch.int8}, r"dtype must be one of .*, got torch\.int8"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        plan_memory(LLAMA, RandConfig(density=0.1), **options)


def test_what_cannot_be_planned():
    with pytest.raises(ConfigError, match="'lottery_ticket' do not go together: the weights themselves train"):
        plan_memory(LLAMA, LotteryTicketConfig(density=0.1), load_in_4bit=True)
    with pytest.raises(ConfigError, match="'ada_sft' do not go together: the weights themselves train"):
        plan_memory(LLAMA, AdaSftConfig(), load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"'lora' cannot be planned for this model: .* Target modules .*nothing"):
        plan_memory(LLAMA, LoraConfig(target_modules=["nothing"]))
    choices = copy.deepcopy(BERT)
    choices.architectures = ["BertForMultipleChoice"]
    with pytest.raises(ConfigError, match="a step of it without data, fails with RuntimeError: shape"):
        plan_memory(choices)
    with pytest.raises(ConfigError, match="takes no input_ids: only models of text can be planned"):
        plan_memory(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                              architectures=["ViTForImageClassification"]))  # fmt: skip
    with pytest.raises(ConfigError, match="the class of the model is not known"):
        plan_memory(LlamaConfig(**SMALL))
    with pytest.raises(ConfigError, match="there is no folder 'no/such/model'"):
        plan_memory("no/such/model")


# What fits


def test_the_largest_density_fits_and_a_larger_one_does_not():
    def plan_with(config):
        return plan_memory(LLAMA, config, sequence_length=4)

    low, high = (plan_with(RandConfig(density=density)).peak for density in (1e-5, 1.0))
    limit = (low + high) // 2
    density, plan = largest_density(RandConfig(density=0.5), plan_with, limit)
    assert plan.peak <= limit < plan_with(RandConfig(density=density * 1.25)).peak
    assert plan_with(RandConfig(density=density)).peak == plan.peak
    assert largest_density(RandConfig(density=0.5), plan_with, high) == (1.0, plan_with(RandConfig(density=1.0)))
    assert largest_density(RandConfig(density=0.5), plan_with, low - 1) is None


def test_a_method_that_the_model_cannot_have_is_left_out():
    plan = plan_memory(LLAMA, RandConfig(density=0.1), sequence_length=4)

    def refuse():
        raise ConfigError("not for this model")

    assert fitting_methods({"a": refuse, "b": lambda: plan}, plan.peak) == {"b": plan}
    assert fitting_methods({"b": lambda: plan}, plan.peak - 1) == {}


@pytest.mark.parametrize("criterion", ["fisher", "largest_weight"])
def test_criteria_are_planned_though_there_is_no_weight_to_rank(criterion):
    config = OneShotConfig(density=0.1, criterion=criterion)
    plan = plan_memory(LLAMA, config, batch_size=2, sequence_length=8)
    rand = plan_memory(LLAMA, RandConfig(density=0.1, budget="global"), batch_size=2, sequence_length=8)
    assert plan.num_trained == rand.num_trained
    selection = ["selection by gradients"] if criterion == "fisher" else []
    assert [phase.name for phase in plan.phases] == [*selection, "training"]


# The linear layers of LLAMA: queries, keys, values and outputs, and the three of the feed-forward part, in two layers.
LINEAR = 2 * (4 * 16 * 16 + 3 * 16 * 24)


@pytest.mark.parametrize(
    ("criterion", "means"), [("fisher", 1), ("gradient", 1), ("weight_times_gradient", 1), ("signal", 2)]
)
def test_a_selection_by_gradients_holds_sums_of_a_part_of_the_targets(criterion, means):
    if criterion == "signal":
        criterion = Criterion(lambda weight, g: g.mean.square() / g.mean_squared, ("mean", "mean_squared"))

    def selection(**options) -> PhaseMemory:
        config = OneShotConfig(density=0.1, criterion=criterion, **options)
        return plan_memory(LLAMA, config, batch_size=1, sequence_length=8).phases[0]

    whole, quarters = selection(selection_passes=1), selection(selection_passes=4)
    assert whole.parts["sums of gradients"] == 4 * means * LINEAR
    # Parts are cut between tensors; the largest has at most a tensor more than its share.
    most = 4 * means * (LINEAR / 4 + 16 * 24)
    assert 4 * means * LINEAR / 4 <= quarters.parts["sums of gradients"] <= most
    # Beside them, at the end of a backward pass, lies the batch's own gradient.
    assert whole.total >= whole.parts["base weights"] + 4 * (means + 1) * LINEAR
    assert whole.total > quarters.total


def test_a_selection_counts_embeddings_and_comes_before_spiel_too():
    config = OneShotConfig(density=0.1, criterion="fisher", target_modules=["embed_tokens"], selection_passes=1)
    assert plan_memory(LLAMA, config, sequence_length=8).phases[0].parts["sums of gradients"] == 2 * 4 * 50 * 16
    spiel = plan_memory(LLAMA, SpielAGConfig(density=0.1, initial_support="gradient"), sequence_length=8)
    names = [phase.name for phase in spiel.phases]
    assert names == ["selection by gradients", "training", "estimating gradients"]
    head = OneShotConfig(density=0.1, criterion="fisher", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert plan_memory(LLAMA, head, sequence_length=8).phases[0].parts["heads"] == 4 * 50 * 16
    chosen = SpielAGConfig(density=0.1, initial_support="gradient", counts={"model.layers.0.mlp.up_proj.weight": 9})
    assert [phase.name for phase in plan_memory(LLAMA, chosen, sequence_length=8).phases] == names[1:]


def test_scaled_steps_hold_the_values_from_before_and_how_far_they_moved():
    def training(**options) -> PhaseMemory:
        config = RandConfig(density=0.5, **options)
        return plan_memory(LLAMA, config, batch_size=1, sequence_length=1).phases[0]

    fitted = training(fitted_rate=True)
    # So short a sequence that the optimizer's step is when most is taken.
    assert fitted.parts["temporaries"] == 2 * fitted.parts["adapter values"]
    assert fitted.parts["gradients"] == fitted.parts["adapter values"]
    # The mean squared inputs of each layer: of 16 columns, but for the 24 of the last.
    energies = 4 * 2 * (6 * 16 + 24)
    assert fitted.parts["originals"] == training().parts["originals"] + energies


def test_a_support_of_two_rates_costs_them_and_a_copy_of_its_values():
    def training(**options) -> PhaseMemory:
        config = OneShotConfig(density=0.5, criterion="gradient", **options)
        return plan_memory(LLAMA, config, batch_size=1, sequence_length=1).phases[-1]

    halves = training(random_share=0.5)
    assert halves.parts["temporaries"] == 2 * halves.parts["adapter values"]
    assert halves.parts["rates of the weights"] == halves.parts["adapter values"]
    assert "rates of the weights" not in training().parts


def test_nominating_over_whole_updates_tracks_more():
    def window(**options) -> PhaseMemory:
        return plan_memory(LLAMA, SpielAGConfig(density=0.1, **options), batch_size=1, sequence_length=64).phases[-1]

    plain, tracking = window(), window(nomination_updates=1)
    # An index, whether it was nominated, and three float32 sums; twice as many positions while updates nominate.
    assert plain.parts["growth candidates"] == 17 * round(0.1 * LINEAR)
    assert tracking.parts["growth candidates"] == 2 * plain.parts["growth candidates"]
    before = window(drop_by="change_since_reselection")
    assert before.parts["values of the last reselection"] == before.parts["adapter values"]
    assert "values of the last reselection" not in plain.parts


def test_growth_by_the_weights_too_holds_sizes_and_products_while_updates_nominate():
    def temporaries(grow_by: str) -> int:
        big = LlamaConfig(**{**SMALL, "intermediate_size": 40_000}, architectures=["LlamaForCausalLM"])
        config = SpielAGConfig(density=1e-4, target_modules=["down_proj"], grow_by=grow_by, nomination_updates=1)
        return plan_memory(big, config, batch_size=1, sequence_length=1).phases[-1].parts["temporaries"]

    assert temporaries("fisher") == temporaries("gradient")
    more = temporaries("weight_times_gradient") - temporaries("gradient")
    assert more == pytest.approx(4 * 16 * 40_000, rel=1e-4)


def test_a_selection_recomputes_activations_where_training_does():
    def activations(**options) -> int:
        config = OneShotConfig(density=0.1, criterion="fisher")
        plan = plan_memory(LLAMA, config, batch_size=4, sequence_length=32, **options)
        return plan.phases[0].parts["activations"]

    assert activations(gradient_checkpointing=True) < activations()


def test_more_tokens_than_the_model_has_positions():
    match = r"sequence_length must be at most 32, the positions of this model .*, got 33"
    config = copy.deepcopy(LLAMA)
    config.max_position_embeddings = 32
    with pytest.raises(ConfigError, match=match):
        plan_memory(config, RandConfig(**REQUEST), sequence_length=33)
    assert plan_memory(config, RandConfig(**REQUEST), sequence_length=32).peak > 0
    # RoBERTa's table of 34 rows begins to count behind the padding's, which is row 1.
    roberta = RobertaConfig(**SMALL, max_position_embeddings=34, pad_token_id=1, architectures=["RobertaForMaskedLM"])
    with pytest.raises(ConfigError, match=match):
        plan_memory(roberta, RandConfig(**REQUEST), sequence_length=33)


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match=r"task_type must be one of \['CAUSAL_LM', .*got 'CAUSAL'"):
        plan_memory(LLAMA, RandConfig(**REQUEST), sequence_length=8, task_type="CAUSAL")


@pytest.mark.parametrize("whole", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
@pytest.mark.parametrize("make", [RandConfig, SpielAGConfig, SpielMAConfig, LotteryTicketConfig])
def test_heads_and_rows_of_tokens_are_planned_as_they_train(make, whole):
    config = make(num_weights=10, target_modules=["q_proj"], **whole)
    extra = 50 * 16 if "modules_to_save" in whole else 2 * 16
    plan = plan_memory(LLAMA, config, sequence_length=8)
    assert plan.num_trained == 10 + extra
    assert plan.phases[-1].all_gradients == 4 * (10 + extra)


WHOLE = {
    "a head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [1, 2, 3]},
    "rows and a head": {"trainable_token_indices": {"embed_tokens": [1, 2]}, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("name", ["adamw", "sm3"])
def test_the_dense_phase_trains_what_is_whole_and_keeps_where_it_started(kind, whole, name):
    config, request = MODELS[kind][0], {"num_weights": 10, "target_modules": ["q_proj"]}
    if kind == "tied" and whole == "a head":
        pytest.skip("PEFT unties a tied head, which is copied then")
    method = LotteryTicketConfig(**request, **WHOLE[whole])
    without = plan_memory(config, LotteryTicketConfig(**request), batch_size=5, sequence_length=10, optimizer=name)
    dense = plan_memory(config, method, batch_size=5, sequence_length=10, optimizer=name).phases[0]
    real = get_peft_model(LlamaForCausalLM(config), method)
    with start_dense_phase(real) as phase:
        trained = [p for p in real.parameters() if p.requires_grad]
        extra = nbytes(p for n, p in real.named_parameters() if p.requires_grad and n in phase.others)
        optimizer = SM3(trained, lr=1e-3) if name == "sm3" else AdamW(trained)
        take_step(real, optimizer)
        assert extra > 0
        assert dense.all_gradients == nbytes(p.grad for p in trained) == without.phases[0].all_gradients + extra
        assert dense.parts["optimizer states"] == states(optimizer)
        phase.abort()
    assert dense.parts["heads"] == 2 * extra
    assert dense.total > without.phases[0].total


@pytest.mark.parametrize(
    ("method", "quantised"),
    [
        (None, False),
        (AdaSftConfig(), False),
        (LotteryTicketConfig(**REQUEST), False),
        (RandConfig(**REQUEST), True),
        (SpielAGConfig(**REQUEST, total_steps=100), True),
        (BottleneckConfig(), True),
        (LoraConfig(target_modules="all-linear"), True),
    ],
    ids=["full", "ada_sft", "lottery_ticket", "rand", "spiel_ag", "bottleneck", "lora"],
)
def test_what_needs_less_is_possible_and_needs_less(method, quantised):
    llama = LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 96}, architectures=["LlamaForCausalLM"])
    plan = plan_memory(llama, method, batch_size=16, sequence_length=16)
    assert ("load_in_4bit" in plan.ways_to_less) is quantised
    for way in plan.ways_to_less:
        assert plan_memory(llama, method, batch_size=16, sequence_length=16, **{way: True}).peak < plan.peak
    all_taken = plan_memory(llama, method, sequence_length=16, gradient_checkpointing=True, load_in_4bit=quantised)
    assert all_taken.ways_to_less == ()
