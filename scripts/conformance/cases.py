"""The cases: configuration and class of transformers, what the configuration says, and what must not be ignored.

`values` overrides the middle and half width of tensors whose names contain the key, `add_one` says that norms add one to
their weights, `drop` leaves out tensors that the text does not need, `saved` and `unsaved` change the `config.json` that is
written. `ignoring` lists merge patches of `config.json` (null removes a key) that must change the logits.
"""

BASE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rope_theta=1000.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)


def case(family, ignoring=(), keys=None, **more):
    """A case of the classes `FAMILYConfig` and `FAMILYForCausalLM`."""
    return {
        "config": f"{family}Config", "class": f"{family}ForCausalLM", "keys": {**BASE, **(keys or {})},
        "ignoring": list(ignoring), **more,
    }


def of_parts(family, kind, ignoring, text, vision, **more):
    """A case of a model that also sees: the text's part is nested. Files have the names of transformers before 4.52."""
    def file(name):
        if name.startswith("model.language_model."):
            return "language_model.model." + name.removeprefix("model.language_model.")
        return "language_model." + name if name.startswith("lm_head") else name.removeprefix("model.")
    return {
        "config": f"{family}Config", "class": f"{family}ForConditionalGeneration",
        "keys": dict(text_config={**BASE, "model_type": kind, **text}, vision_config=vision),
        "ignoring": list(ignoring), "drop": ["vision_tower"], "names": file, **more,
    }


GEMMA = dict(
    add_one=True, embedding=0.35,
    values={"post_attention_layernorm": (4.0, 0.5), "post_feedforward_layernorm": (4.0, 0.5)})
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Frequencies of 16 columns that turn.
LONG = {
    "type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
LONG6 = {**LONG, "short_factor": LONG["short_factor"][:6], "long_factor": LONG["long_factor"][:6]}

CASES = {
    "llama": case("Llama", [{"rope_scaling": None}], dict(rope_scaling=LLAMA3)),
    "llama-linear": case(
        "Llama", [{"rope_scaling": None}, {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}],
        dict(rope_scaling=LINEAR, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama-yarn": case("Llama", [{"rope_scaling": None}, {"rope_scaling": {"factor": 2.0}}], dict(rope_scaling=YARN)),
    "llama-dynamic": case("Llama", [], dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0})),
    "mistral": case("Mistral", [{"sliding_window": None}], dict(sliding_window=12)),
    "mistral-heads": case("Mistral", [], dict(sliding_window=None, head_dim=24)),
    "mistral-small": of_parts(
        "Mistral3", "mistral", [{"text_config": {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}}],
        dict(head_dim=32, sliding_window=None, num_attention_heads=2, num_key_value_heads=1),
        dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             image_size=28, patch_size=14)),
    "gemma3-parts": of_parts(
        "Gemma3", "gemma3_text", [{"text_config": {"sliding_window": 128}}],
        dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=12, sliding_window_pattern=3,
             rope_local_base_freq=100.0, tie_word_embeddings=True),
        dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, image_size=28, patch_size=14),
        **GEMMA),
    "qwen2": case(
        "Qwen2", [{"sliding_window": 11}, {"use_sliding_window": False}],
        dict(use_sliding_window=True, sliding_window=12, max_window_layers=1)),
    "qwen3": case("Qwen3", [{"rope_theta": 100.0}], dict(head_dim=32, tie_word_embeddings=True)),
    "gemma": case("Gemma", [], dict(head_dim=32, hidden_activation="gelu_pytorch_tanh"), **GEMMA),
    "gemma2": case(
        "Gemma2",
        [{"sliding_window": 128}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None},
         {"query_pre_attn_scalar": 16}],
        dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=12, attn_logit_softcapping=4.0,
             final_logit_softcapping=6.0, num_hidden_layers=4),
        **GEMMA),
    "gemma3": case(
        "Gemma3Text",
        [{"sliding_window": 128}, {"rope_local_base_freq": 1000.0}, {"rope_scaling": None}, {"query_pre_attn_scalar": 16}],
        dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=12, sliding_window_pattern=3, num_hidden_layers=4,
             rope_local_base_freq=100.0, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        add_one=True, embedding=0.3, **{"class": "Gemma3ForCausalLM"}),
    "phi3": case("Phi3", [{"sliding_window": None}], dict(sliding_window=12, tie_word_embeddings=False)),
    "phi4-short": case(
        "Phi3", [{"rope_scaling": None}, {"partial_rotary_factor": 1.0, "rope_scaling": None}],
        dict(rope_scaling=LONG6, partial_rotary_factor=0.75, original_max_position_embeddings=96, tie_word_embeddings=True)),
    "phi4-long": case(
        "Phi3", [{"rope_scaling": None}],
        dict(rope_scaling=LONG, original_max_position_embeddings=16, tie_word_embeddings=False)),
    "smollm3": case(
        "SmolLM3", [{"no_rope_layers": [1, 1, 1]}],
        dict(no_rope_layer_interval=2, tie_word_embeddings=True)),
    "granite": case(
        "Granite",
        [{"embedding_multiplier": 1.0}, {"logits_scaling": 1.0}, {"residual_multiplier": 1.0},
         {"attention_multiplier": 0.25}],
        dict(embedding_multiplier=6.0, logits_scaling=2.0, residual_multiplier=0.4, attention_multiplier=0.5,
             tie_word_embeddings=True),
        embedding=0.5),
    "olmo2": case("Olmo2", [{"rope_theta": 100.0}]),
    "olmo3": case(
        "Olmo3", [{"sliding_window": 128}, {"rope_scaling": None}],
        dict(sliding_window=12, num_hidden_layers=4, rope_scaling=YARN)),
    "cohere": case(
        "Cohere", [{"logit_scale": 1.0}], dict(logit_scale=0.4, tie_word_embeddings=True), values={"embed": (0.0, 1.0)}),
    "cohere2": case(
        "Cohere2", [{"logit_scale": 1.0}, {"sliding_window": 128}],
        dict(logit_scale=0.4, sliding_window=12, num_hidden_layers=4, tie_word_embeddings=True),
        values={"embed": (0.0, 1.0)}),
    "glm": case("Glm", [{"partial_rotary_factor": 1.0}], dict(head_dim=16, partial_rotary_factor=0.5, attention_bias=True)),
    "glm4": case(
        "Glm4", [{"partial_rotary_factor": 1.0}], dict(head_dim=16, partial_rotary_factor=0.5, attention_bias=True)),
    "seed-oss": case("SeedOss", [], dict(head_dim=32, attention_bias=True, attention_out_bias=False)),
    "starcoder2": case("Starcoder2", [{"sliding_window": None}], dict(sliding_window=12, use_bias=True)),
    "mixtral": case(
        "Mixtral", [{"num_experts_per_tok": 1}], dict(num_local_experts=6, num_experts_per_tok=2, head_dim=16)),
    "qwen3-moe": case(
        "Qwen3Moe", [{"num_experts_per_tok": 2}, {"norm_topk_prob": False}],
        dict(head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True,
             mlp_only_layers=[1])),
    "gpt-oss": case(
        "GptOss", [{"sliding_window": 128}, {"num_experts_per_tok": 1}],
        dict(head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=12, attention_bias=True,
             rope_scaling={**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}),
        transposed=True, values={"sinks": (1.0, 1.0), "mlp.router": (0.0, 0.4)}),
    "glm4-moe": case(
        "Glm4Moe", [{"num_experts_per_tok": 2}, {"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}],
        dict(head_dim=16, partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True, n_routed_experts=8,
             num_experts_per_tok=3, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1,
             routed_scaling_factor=1.5, norm_topk_prob=True, n_group=1, topk_group=1),
        values={"e_score_correction_bias": (0.0, 0.1)}),
}
