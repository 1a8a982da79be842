"""Tiny random models of every type that GPTQModel defines and whose experts lie in one tensor in transformers.

Sizes are set by the names that configs of transformers share; `OWN` has what a type needs besides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXPERTS, ROUTED, LAYERS = 4, 2, 2
# Ids of bytes, and a few more for what a config wants of special tokens.
VOCABULARY = 272
# What lies in a config of transformers under one of these names is set to this; lists by layers are cut to two.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "num_experts_per_tok": ROUTED, "num_experts_per_token": ROUTED, "num_experts": EXPERTS,
    "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS, "moe_k": ROUTED,
    "n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 64, "moe_topk": ROUTED,
    "first_k_dense_replace": 0, "num_dense_layers": 0, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "qk_head_dim": 64, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 257, "bos_token_id": 258, "eos_token_id": 259, "decoder_sparse_step": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_num_heads": 2, "linear_head_dim": 32, "sliding_window": 64, "depth": 1, "num_heads": 2,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 64,
}  # fmt: skip
# Two layers of two kinds, where a type has them.
MIXED = ["linear_attention", "full_attention"]
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_dt_rank": 8,
    "use_mamba_kernels": False,
}  # fmt: skip
VISION: dict[str, Any] = {"out_hidden_size": 64, "patch_size": 4, "deepstack_visual_indexes": []}
OWN: dict[str, dict[str, Any]] = {
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": MIXED, "shared_intermediate_size": 64, **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
              **MAMBA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": 4,
                   "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
                   "moe_shared_expert_intermediate_size": 64, "use_mamba_kernels": False},
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED},
    "qwen3_5_moe": {"text_config": {"layer_types": MIXED}, "vision_config": VISION},
    "qwen3_vl_moe": {"vision_config": VISION},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                                           "mrope_section": [2, 3, 3]}},
    "gemma4_text": {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": ROUTED, "per_layer_config": {},
                    "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
                    "vocab_size_per_layer_input": VOCABULARY},
    "bailing_hybrid": {"layer_types": MIXED, "mlp_layer_types": ["sparse", "sparse"]},
}  # fmt: skip
NGRAMS: dict[str, Any] = {
    "ngram_vocab_size_base": 512, "split_ngram_parts": 1, "hc_count": 2, "hc_lowrank": 16, "ple_embed_dim": 64,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
OWN |= {
    "gemma4": {"text_config": OWN["gemma4_text"]},
    "glm4v_moe": {"text_config": OWN["glm4v_moe_text"], "vision_config": VISION},
    "diffusion_gemma": {"text_config": OWN["gemma4_text"], "canvas_length": 32},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse", "sparse"]}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [64, 64], "mlp_layer_types": ["sparse", "sparse"],
                                        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                            "mrope_section": [6, 6, 4]}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "qk_head_dim": 32, "head_dim": 0, "layer_types": MIXED,
                                  "mlp_layer_types": ["sparse", "sparse"], "indexer_types": ["full", "full"],
                                  "index_n_heads": 2, "index_head_dim": 32, "index_topk": 32}},
    "inkling_mm_model": {
        "text_config": {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 32, "d_rel": 16,
                        "mlp_layer_types": ["sparse", "sparse"], "layer_types": ["hybrid_sliding", "hybrid"]},
        "vision_config": {"text_hidden_size": 64, "n_layers": 4, "hidden_size": 64},
        "audio_config": {"text_hidden_size": 64},
    },
    "llama4": {"text_config": {"intermediate_size_mlp": 96, "attention_chunk_size": 64},
               "vision_config": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
                                 "image_size": 56}},
    "longcat_flash": {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "minimax_m3_vl": {"text_config": {"dense_intermediate_size": 96, "shared_intermediate_size": 64, "rotary_dim": 16,
                                      "index_head_dim": 32, "index_n_heads": 2},
                      "projector_hidden_size": 64, "merged_hidden_size": 256},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2,
                                         "text_config": {"shared_expert_intermediate_size": 64}}},
    "qwen4_exp_text": {"layer_types": MIXED, **NGRAMS},
    "qwen4_exp": {"text_config": {"layer_types": MIXED, **NGRAMS}, "vision_config": VISION},
}  # fmt: skip


def small_config(model_type: str) -> Any:
    """The tiny config of a type."""
    from transformers import AutoConfig

    def cut(known: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        found = {name: SIZES[name] for name in known if name in SIZES}
        for name, value in known.items():
            if isinstance(value, dict) and name.endswith("_config") and name != "per_layer_config":
                found[name] = cut(value, own.get(name, {}))
                if name in own:
                    own = {other: one for other, one in own.items() if other != name}
        return found | own

    whole = AutoConfig.for_model(model_type).to_dict()
    return AutoConfig.for_model(model_type, **cut(whole, OWN.get(model_type, {})))


def make(model_type: str, folder: Path) -> str:
    """Write a tiny random model with a tokenizer; the name of its class. To be called where no host is imported, since
    GPTQModel has transformers save experts in another layout than hubs hold."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = small_config(model_type)
    several = any(name in config.sub_configs for name in ("vision_config", "thinker_config"))
    ways = ["AutoModelForImageTextToText", "AutoModelForMultimodalLM"] if several else []
    for way in (*ways, "AutoModelForCausalLM", "AutoModelForTextToWaveform", "AutoModel"):
        opener = getattr(transformers, way, None)
        if opener is not None and type(config) in opener._model_mapping:
            model = opener.from_config(config, dtype=torch.bfloat16)
            break
    else:
        raise LookupError("transformers has no class of models for it")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if several:
        # GPTQModel wants a processor, and the models' own need torchvision for videos. Nothing here reads an image.
        image = transformers.CLIPImageProcessorPil()
        chat = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
        transformers.LlavaProcessor(
            image_processor=image, tokenizer=byte_tokenizer(), chat_template=chat
        ).save_pretrained(folder)
    return type(model).__name__


def byte_tokenizer() -> Any:
    """A token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(["<unk>", "<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
