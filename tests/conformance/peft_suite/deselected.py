"""What of PEFT's test-suite is not run over our configs, must fail over them, or rightly skips itself, and why.

Keys are regular expressions for `file::Class::test` (with `[parameters]` in `EXPECTED_FAILURES`); the first match
counts. A whole run fails when a key matches nothing any more, when an expected failure passes, when a test skips itself
for a reason that is not here, and when PEFT ships a test file that stands nowhere here.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from peft_sparse import ConfigError, FormatError


class Fails(NamedTuple):
    """How a test must fail, and why; any other exception is a failure."""

    how: type[BaseException] | tuple[type[BaseException], ...]
    why: str


_NOT_RAISED = pytest.fail.Exception
RUN_FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_config.py",
    "test_low_level_api.py",
    "test_other.py",
    "test_quantization.py",
)

_OTHER = "Tests one other tuner; no config in it can be ours."
_GPU = "Needs an accelerator, or the quantisation packages of one."
_HUB = "Talks to the Hugging Face Hub."
_UTILITY = "Tests a helper of PEFT's; no tuner takes part."
_OWN = (
    "Asserts LoRA's class and parameter names and its counts throughout; what it means for us is in tests/unit/tuners."
)
_ALONE = """
    adamss_asa adaption_prompt arrow bdlora boft cartridge cpt deft frod lora_ga lora_intruders lora_megatron
    lora_variants lorafa multitask_prompt_tuning osf poly pvera randlora riemannian_lora shadow shira supertuning
    unilora vblora velora vera xlora
"""
_AROUND_LORA = """
    helpers initialization integrations target_parameters trainable_tokens tuners_utils
"""
FILES = {
    **{f"test_{name}.py": _OTHER for name in _ALONE.split()},
    **{f"test_{name}.py": _OWN for name in _AROUND_LORA.split()},
    **{f"test_{name}.py": _GPU for name in ("common_gpu", "gptqmodel", "gpu_examples")},
    **{f"test_{name}.py": _HUB for name in ("auto", "hub_features", "stablediffusion", "vision_models")},
    **{f"test_{name}.py": _UTILITY for name in ("bufferdict", "incremental_pca", "loraplus", "mapping")},
    "test_lora_conversion.py": "Tolerances of low-rank deltas; ours have full rank.",
    "test_mixed.py": "PEFT writes down the tuners that PeftMixedModel takes; a package outside PEFT cannot join them.",
    "test_torch_compile.py": "Needs a dataset of the Hub, and hours; torch.compile of ours is in tests/numerics.",
}

# Not run: nothing in them can be ours, or they need the network.
NOT_OURS = {
    r"test_custom_models::.*::test_(ia3|glora|gralora|pvera|trainable_tokens|monteclora)_.*": _OTHER,
    r"test_custom_models::.*::test_set_requires_grad_trainable_tokens": _OTHER,
    r"test_custom_models::.*::test_default_target_modules_osf": _OTHER,
    r"test_custom_models::TestRequiresGrad::test_requires_grad_"
    r"(ia3|adalora|loha|lokr|oft|hra|miss|boft|lntuning|vera|pvera|randlora|vblora|fourierft)_.*": _OTHER,
    r"test_custom_models::TestDynamicDispatch::.*": "LoRA's register of custom layers; we have none.",
    r"test_custom_models::TestLayerRepr::.*": "The printed form of LoRA's layers.",
    r"test_custom_models::.*::test_add_weighted_adapter_(cat_with_rank_pattern|with_different_scaling)": (
        "Compares LoRA's ways to combine low-rank factors (cat, svd) with each other; ours in tests/unit/composition."
    ),
    r"test_custom_models::.*(dora|lora_bias|multirank|_lora_opt_timing|lora_safe_merge).*": "A feature of LoRA's own.",
    r"test_decoder_models::.*::test_(prefix_tuning|prompt_tuning|prompt_learning|generate_adalora)_.*": _OTHER,
    r"test_decoder_models::.*::test_(lora_layer_replication|(training|set_requires_grad)_prompt_.*)": _OTHER,
    r"test_encoder_decoder_models::.*::test_(active_adapters_|training_)?prompt_learning.*": _OTHER,
    r"test_encoder_decoder_models::.*::test_save_shared_tensors": "LoRA's bias field.",
    r"test_feature_extraction_models::.*::test_(training_prompt_learning_tasks|passing_input_embeds_works)": _OTHER,
    r"test_seq_classifier::.*::test_(prompt_tuning_text|prompt_learning).*": _OTHER,
    r"test_config::.*::test_(from_pretrained|save_pretrained_with_runtime_config)": _HUB,
    r"test_config::.*::test_from_pretrained_cache_dir(_remote)?": _HUB,
    r"test_config::.*::test_(prompt_encoder|ia3|adalora)_.*": _OTHER,
    r"test_config::TestLoraNestedConfigRoundTrip::.*": "Configs inside LoraConfig.",
    r"test_decoder_models::.*::test_lora_conversion": "Tolerances of low-rank deltas; ours have full rank.",
    r"test_low_level_api::.*::test_prefix_removal_is_undone": _HUB,
    r"test_low_level_api::.*::test_inject_from_state_dict_.*(weight_conversion|diffusion)": _HUB,
    r"test_low_level_api::.*::test_base_model_module_named_like_peft_prefix": (
        "Looks the config class up in a table of PEFT's own prefixes."
    ),
    r"test_other::.*::test_get_no_split_modules_recursive": _HUB,
}

# Run, and must fail: we depart from PEFT on purpose, or the test knows only tuners of PEFT's own.
_DTYPE = Fails(
    AssertionError,
    "autocast_adapter_dtype=False makes PEFT's adapters follow the base model's dtype; ours follow values_dtype: "
    "float32 values over a bfloat16 weight are what makes small updates count.",
)
_COPY = Fails(
    AssertionError,
    "peft_config holds a copy with the answer (counts); the object that the user passed is not rewritten.",
)
_LORA_NAMES = Fails(
    (AssertionError, AttributeError), "Names LoRA's own parameters; tests/unit/tuners checks requires_grad of ours."
)
_DEFAULT_TARGETS = Fails(
    (AssertionError, _NOT_RAISED), "Without target_modules ours tune all linear layers, whatever the model's type."
)
_MHA = Fails(
    ConfigError,
    "nn.MultiheadAttention reads its weights past its submodules, so a delta would be lost: refused by name.",
)
_POSITIONS = Fails(
    (ValueError, IndexError),
    "Target 'all' tunes position embeddings, which the model looks up once for the whole batch.",
)
_FLAT = Fails(
    ValueError, "OPT flattens batch and time before its MLP, so one adapter per example cannot be told apart: refused."
)
_UNKNOWN_TO_BOTTLENECKS = Fails(
    ConfigError, "Not in the table of architectures for bottleneck adapters: refused, with what to name instead."
)
_NO_MERGE = Fails(ValueError, "A bottleneck adapter cannot be merged into weights: refused, and baked in instead.")
_SMALL = Fails(
    AssertionError,
    "The test wants any two random adapters to generate different tokens of a tiny model; some draws do not.",
)
_WORDING = Fails(AssertionError, "The wording of LoRA's error; ours says the same and the way out.")
EXPECTED_FAILURES = {
    r".*\[(.*-)?BottleneckConfig-.*(OPTFor|opt-125m|GPTJFor|BloomFor|GPTNeoXFor).*\]": _UNKNOWN_TO_BOTTLENECKS,
    r".*::test_(merge_layers(_is_.*)?|disable_adapters_with_merging)\[(.*-)?(Bottleneck|MadG)Config-.*\]": _NO_MERGE,
    r".*::test_(forward_b?float16(_no_autocast)?|delete_merged_adapter_.*)\[.*-(Bottleneck|MadG)Config-.*\]": _NO_MERGE,
    r".*::test_adapter_dtype_autocast\[(True|False)-False-dtype[01]-(?!.*(Bottleneck|MadG)Config).*\]": _DTYPE,
    # transformers keeps T5's `wo` in float32, and PEFT then allows float32 everywhere.
    r".*::test_add_adapter_no_autocast_adapter_dtype\[(?!dtype0-.*T5|.*(Bottleneck|MadG)Config).*\]": _DTYPE,
    r"test_feature_extraction_models::.*\[(.*-)?SparseConfig-.*DebertaModel\]": Fails(
        ConfigError, "Target 'all' meets DisentangledSelfAttention, which has parameters of its own: refused by name."
    ),
    r".*::test_from_pretrained_config_construction.*": _COPY,
    r".*::test_prepare_for_training_parametrized\[SparseConfig-.*": Fails(
        AssertionError, "The test asserts that embeddings are frozen; target 'all' tunes them."
    ),
    r".*::test_mixed_adapter_batches\[SparseConfig-.*(OPT|GPT2|T5|Bart).*\]": _POSITIONS,
    r".*::test_generate_with_mixed_adapter_batches\[SparseConfig-.*(OPT|T5|Bart).*\]": _POSITIONS,
    r".*::test_(mixed_adapter_batches|generate_with_mixed_adapter_batches)\[(Rand|Lottery|OneShot|Ada).*OPT.*\]": _FLAT,
    r".*::test_generate_with_mixed_adapter_batches\[(Ada.*GPT2|RandConfig-config_kwargs2-.*Bart).*\]": _SMALL,
    r".*::test_mixed_adapter_batches_(length_mismatch|merged)_raises.*": _WORDING,
    r".*::test_(mixed_adapter_batches_mha_raises|mha_gradients_.*|unload_adapter_multihead_attention).*": _MHA,
    r"test_custom_models::.*::test_disable_adapters(_with_merging)?\[MLP 1 (LotteryTicket|DeftX|OneShot)-.*\]": Fails(
        AssertionError, "The test wants a fresh adapter to be the identity; this one is a random ticket (see cases.py)."
    ),
    r"test_custom_models::.*::test_multiple_active_adapters_with_(same|overlapping)_modules_to_save_raises\[.*": Fails(
        _NOT_RAISED, "Of several active adapters with a head for the same module the last one's acts."
    ),
    r"test_custom_models::.*::test_non_existing_model_card": Fails(
        AssertionError, "The test wants a long card; ours leaves PEFT's empty sections out."
    ),
    r"test_custom_models::.*::test_load_resized_embedding_ignore_mismatched_sizes": Fails(
        _NOT_RAISED, "An adapter of a smaller vocabulary loads onto a larger one: its rows are the first there."
    ),
    r"test_custom_models::.*::test_adapter_name_makes_no_difference\[config00\]": Fails(
        AssertionError, "Random supports are drawn from the seed and the adapter's name, so that two adapters differ."
    ),
    r"test_custom_models::TestDefaultTargetModules::.*": _DEFAULT_TARGETS,
    r"test_custom_models::TestRequiresGrad::test_requires_grad_(lora|modules|follows_inference)_.*": _LORA_NAMES,
    r"test_custom_models::TestRequiresGrad::test_loading_adapter_preserves_custom_requires_grad": _LORA_NAMES,
    r"test_custom_models::.*::test_add_adapter_rejects_duplicate_name_without_mutation\[True\]": Fails(
        ValueError, "PEFT writes down the tuners that PeftMixedModel takes; a package outside PEFT cannot join them."
    ),
    r"test_custom_models::.*::test_multiple_adapters_(same|seq_cls_mixed)_modules_to_save_merging.*": Fails(
        AssertionError, "LoRA refuses to combine adapters with heads; ours takes the head named by head_from."
    ),
    r"test_decoder_models::.*::test_save_pretrained_targeting_lora_to_embedding_layer\[.*-auto\]": Fails(
        _NOT_RAISED,
        "The test wants the whole base embedding in the file of an adapter on it; ours holds the delta alone.",
    ),
    r"test_low_level_api::.*::test_inject_from_state_dict_(extra|missing)_keys_warning.*": Fails(
        (_NOT_RAISED, KeyError), "PEFT warns when a state dict and a config disagree; ours follows the state dict."
    ),
    r"test_low_level_api::.*::test_inject_from_state_dict_low_cpu_mem_usage": Fails(
        FormatError, "Reads the state dict of an adapter that is still on the meta device; ours refuses to write one."
    ),
    r"test_low_level_api::.*::test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name": Fails(
        AssertionError, "The test knows every key; ours has one more, the digest."
    ),
    r"test_low_level_api::.*::test_save_pretrained_warns_for_unsharded_state_dict": _LORA_NAMES,
    r"test_other::.*::test_targeting_trainable_tokens_raises": Fails(
        ConfigError, "PEFT's TypeError names LoRA's layer; ours refuses it before, and names the way out."
    ),
    r"test_config::.*::test_from_peft_type": Fails(ConfigError, "A config of ours must say how many weights to tune."),
    r"test_config::.*::test_from_pretrained_forward_compatible(_load_from_peft_config)?\[(?!Sparse|Ada).*": Fails(
        AssertionError, "PEFT's warning names the class that the type is registered with, SparseConfig."
    ),
    r"test_config::.*::test_(lora_config_layers_to_transform_validation|regex_with_layer_indexing_lora)": Fails(
        (AssertionError, _NOT_RAISED), "LoRA refuses layers_to_transform next to a regex; ours applies both."
    ),
}

# Runtime skips that are right.
_ONLY_LORA = "The test asks for a feature of LoRA's own."
SKIPS = {
    r"only LoRA has .*": _ONLY_LORA,
    r"Testing bias warnings only for LoraConfig or BOFTConfig": "bias=... is a field of theirs; ours is target_biases.",
    r".*(does not support the 'bias' argument|support training the bias directly).*": (
        "bias=... is a field of LoRA's and BOFT's; ours is target_biases."
    ),
    r"(Test does not work with model .*qwen2|Combining Gemma adapters with SVD.*)": (
        "PEFT skips these models for LoRA's SVD, before it looks at the tuner; the other models run."
    ),
    r"Multiple active adapters with modules_to_save/trainable_token_indices.*": "PEFT allows one head at a time.",
    r"(Skipping FSDP \+ target_paramters|Merging with target_parameters is not supported).*": (
        "PEFT's own target_parameters cannot do it; ours in tests/unit/tuners."
    ),
    r"Bnb 4 bit quant with CPU results in high variance.*": "PEFT skips it on CPUs; ours is in tests/numerics.",
}
