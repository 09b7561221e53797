"""A tiny model on the CPU of every causal architecture that transformers can build from a small config.

A config is shrunk by the names of its options: `hidden_size` becomes 32 whatever the architecture, and so on. `SPECIAL`
has what else an architecture needs. The weights are random, and the head's are large, so that a softcap or a scale
that is left out changes log-probabilities by much.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # configs this small get many warnings

VOCABULARY = 48
LAYERS = 2


def sized(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


SIZES = {
    **sized(VOCABULARY, "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size"),
    **sized(
        32, "hidden_size n_embd d_model dim embedding_size embed_dim emb_dim word_embed_proj_dim dim_model n_embed"
    ),
    **sized(32, "lru_width embedding_dim hidden_size_global cross_attention_hidden_size"),
    **sized(32, "adapter_in_dim adapter_out_dim adapter_input_size out_hidden_size text_hidden_size"),
    **sized(48, "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size"),
    **sized(48, "shared_intermediate_size feed_forward_size"),
    **sized(24, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    **sized(24, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    **sized(LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks"),
    **sized(2, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    **sized(2, "num_key_value_heads swa_num_attention_heads swa_num_key_value_heads linear_num_heads index_n_heads"),
    **sized(2, "linear_num_key_heads linear_num_value_heads num_query_groups heads_per_ngram"),
    **sized(16, "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim d_kv"),
    **sized(16, "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim attention_head_dim"),
    **sized(16, "kv_lora_rank q_lora_rank o_lora_rank hc_lowrank laurel_rank adapter_rank hidden_size_per_layer_input"),
    **sized(16, "ple_embed_dim pronunciation_embed_dim shape_embed_dim attention_head_size"),
    **sized(8, "rotary_dim d_rel"),
    **sized(4, "num_experts num_local_experts n_routed_experts moe_num_experts index_topk"),
    **sized(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num"),
    **sized(1, "n_group topk_group num_expert_group o_groups n_groups mamba_n_groups mamba_ngroups"),
    **sized(16, "mamba_d_state state_size ssm_state_size chunk_size mamba_chunk_size"),
    **sized(2, "mamba_dt_rank time_step_rank"),
    **sized(64, "max_position_embeddings n_positions max_seq_len n_ctx sliding_window sliding_window_size rel_extent"),
    **sized(64, "ngram_vocab_size_base"),
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "clip_vision_model": {"hidden_size": 64},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "4/8"},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16,
                         "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
                       "indexer_compress_ratio": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": (8, 8),
                 "axial_pos_embds_dim": (16, 16)},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


# These are not tried.
NOT_BUILT = {
    "blt": "its own config has no num_hidden_layers, which its cache needs",
    "gemma4_assistant": "a draft model, which reads the cache of another model",
    "gemma4_unified_assistant": "a draft model, which reads the cache of another model",
    "musicgen": "its class takes the config of its decoder alone, and has a head per codebook",
    "musicgen_melody": "its class takes the config of its decoder alone, and has a head per codebook",
}
STANDARD_DEVIATION = 4.0  # of what the head returns


@dataclass
class Sweep:
    """Each architecture's model, or why there is none; and how long it took."""

    models: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are slower on more threads, several times on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def causal_model_types() -> list[str]:
    """The model types of `AutoModelForCausalLM`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sweep(dtype: torch.dtype = torch.float32) -> Sweep:
    """A tiny model of every architecture; each is the same whichever others are built."""
    found = Sweep()
    for model_type in causal_model_types():
        start = time.perf_counter()
        if model_type in NOT_BUILT:
            found.failures[model_type] = NOT_BUILT[model_type]
            continue
        try:
            found.models[model_type] = tiny_model(model_type, dtype)
        except Exception as error:
            found.failures[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found.seconds[model_type] = time.perf_counter() - start
    return found


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model in evaluation mode, of 2 or 3 layers; `options` are of its text config. Also for multi-modal types."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM if model_type in causal_model_types() else AutoModelForImageTextToText
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        config = tiny_config(model_type, **options)
        model = kind.from_config(config, attn_implementation="eager", experts_implementation="eager")
        model = model.to(dtype).eval()
        sharpen(model)
    return model


def tiny_config(model_type: str, **options: Any) -> Any:
    """A config of small sizes; `options` are of its text config."""
    from transformers import CONFIG_MAPPING

    return shrunk(CONFIG_MAPPING[model_type](), options)


def token_ids() -> Tensor:
    """[2, 7] of tokens that are not special."""
    return 3 + torch.arange(14).view(2, 7) * 5 % (VOCABULARY - 3)


def sharpen(model: Any) -> None:
    """Scales the head's weight and bias so that what it returns has the standard deviation above."""
    head = model.get_output_embeddings()
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(input_ids=token_ids(), use_cache=False)
        handle.remove()
        for parameter in head.parameters():
            parameter.mul_(STANDARD_DEVIATION / outputs[0].std())


def shrunk(config: Any, options: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = config.get_text_config(decoder=True)
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            sizes[name] = shrunk(value, options if value is text else {})
        elif name in SIZES:
            sizes[name] = SIZES[name]
    sizes.update(shrunk_lists(config))
    sizes.update(SPECIAL.get(config.model_type, {}))
    if text is config:
        sizes.update(options)
    return type(config)(**sizes)


def shrunk_lists(config: Any) -> dict[str, Any]:
    """Lists with an entry per layer: one layer of each kind, three at most, and two at least."""
    layers = getattr(config, "num_hidden_layers", None)
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == layers and not name.startswith("_")
    }
    if not lists:
        return {}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))[:3]
    kinds += kinds[:1] * (LAYERS - len(kinds))
    columns = zip(*kinds, strict=True)
    return {"num_hidden_layers": len(kinds), **{k: list(column) for k, column in zip(lists, columns, strict=True)}}
