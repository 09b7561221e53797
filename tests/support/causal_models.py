"""A tiny model on the CPU of every causal architecture that transformers can build from a small config.

A config is shrunk by the names of its options: `hidden_size` becomes 32 whatever the architecture, and so on. `SPECIAL`
has what else an architecture needs. The weights are random, and the head's are large, so that a softcap or a scale
that is left out changes log-probabilities by much.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 48
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "embed_dim", "emb_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "dim_model", "n_embed"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
}
SPECIAL: dict[str, dict[str, Any]] = {}


@dataclass
class Sweep:
    """Of every architecture: the model, or why there is none; and how long it took."""

    models: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def causal_model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **options: Any) -> Any:
    """The config with small sizes; `options` are of its text config, where it has one."""
    from transformers import CONFIG_MAPPING

    return shrunk(CONFIG_MAPPING[model_type](), options)


def shrunk(config: Any, options: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {}
    text = config.get_text_config(decoder=True)
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            sizes[name] = shrunk(value, options if value is text else {})
        elif name in SIZES:
            sizes[name] = SIZES[name]
    sizes.update(SPECIAL.get(config.model_type, {}))
    sizes["tie_word_embeddings"] = False
    sizes.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if text is config:
        sizes.update(options)
    return type(config)(**sizes)


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **options), attn_implementation="eager")
    model = model.to(dtype).eval()
    sharpen(model)
    return model


def token_ids() -> Tensor:
    return torch.arange(3, 3 + 14).view(2, 7) * 5 % (VOCABULARY - 3) + 3


def sharpen(model: Any) -> None:
    """Scales the head's weights so that what it returns has a standard deviation of 4."""
    head = model.get_output_embeddings()
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach()))
    with torch.no_grad():
        model(input_ids=token_ids())
    handle.remove()
    with torch.no_grad():
        head.weight.mul_(4 / outputs[0].std())


def sweep(dtype: torch.dtype = torch.float32) -> Sweep:
    found = Sweep()
    for model_type in causal_model_types():
        start = time.perf_counter()
        try:
            found.models[model_type] = tiny_model(model_type, dtype)
        except Exception as error:
            found.failures[model_type] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        found.seconds[model_type] = time.perf_counter() - start
    return found
