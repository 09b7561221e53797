"""What a model of transformers does to its logits, read from its config: a scale, a softcap, or nothing.

transformers is not imported. The table below says which options the classes of transformers 5 apply; an option that
may be about logits, of a model type without an entry, is refused.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypedDict

from ..base import checks

__all__ = ["LogitTransform", "logit_transform_of"]


class LogitTransform(TypedDict):
    """What a model does to its logits, as arguments of a loss: `softcap * tanh(logit_scale * x / softcap)`."""

    logit_scale: float
    softcap: float | None


class LogitOptions(NamedTuple):
    """The names of the options that a model type applies, and no others. They are options of its text config."""

    multiplied_by: str | None = None
    divided_by: str | None = None
    softcap: str | None = None
    tokens: str | None = None  # how many of the head's rows are tokens; the model drops the logits of the others
    on_hidden: bool = False  # the scale multiplies the hidden states, right before a head without a bias


FINAL_SOFTCAP = LogitOptions(softcap="final_logit_softcapping")
LOGIT_SCALE = LogitOptions(multiplied_by="logit_scale")
LOGITS_SCALING = LogitOptions(divided_by="logits_scaling")
MULTIPLIED_AND_CAPPED = LogitOptions(multiplied_by="output_multiplier", softcap="final_logit_softcapping")
MUP_WIDTH = LogitOptions(divided_by="logits_mup_width_multiplier", tokens="unpadded_vocab_size", on_hidden=True)
CAPPED_AND_CUT = LogitOptions(softcap="final_logit_softcapping", tokens="unpadded_vocab_size")
IGNORED = LogitOptions()  # there is an option, which the class does not apply

# By model type: of a multi-modal model by its own type, because not every such class applies its text model's options.
LOGIT_OPTIONS = {
    "afmoe": IGNORED,
    "aya_vision": IGNORED,
    "beam": FINAL_SOFTCAP,
    "cohere": LOGIT_SCALE,
    "cohere2": LOGIT_SCALE,
    "cohere2_moe": LOGIT_SCALE,
    "cohere2_vision": IGNORED,
    "cohere_compass": LOGIT_SCALE,
    "cohere_compass_text": LOGIT_SCALE,
    "falcon_h1": LogitOptions(multiplied_by="lm_head_multiplier"),
    "gemma2": FINAL_SOFTCAP,
    "gemma3": IGNORED,
    "gemma3_text": FINAL_SOFTCAP,
    "gemma3n": FINAL_SOFTCAP,
    "gemma3n_text": FINAL_SOFTCAP,
    "gemma4": FINAL_SOFTCAP,
    "gemma4_text": FINAL_SOFTCAP,
    "gemma4_unified": FINAL_SOFTCAP,
    "gemma4_unified_text": FINAL_SOFTCAP,
    "granite": LOGITS_SCALING,
    "granite4_vision": LOGITS_SCALING,
    "granite_docling": LOGITS_SCALING,
    "granite_swa": LOGITS_SCALING,
    "granitemoe": LOGITS_SCALING,
    "granitemoe_swa": LOGITS_SCALING,
    "granitemoehybrid": LOGITS_SCALING,
    "granitemoeshared": LOGITS_SCALING,
    "hyperclovax": LogitOptions(multiplied_by="logits_scaling"),
    "hyperclovax_vision_v2": LogitOptions(multiplied_by="logits_scaling"),
    "inkling2": CAPPED_AND_CUT,
    "inkling2_loop": FINAL_SOFTCAP,
    "inkling2_loop_text": FINAL_SOFTCAP,
    "inkling2_text": CAPPED_AND_CUT,
    "inkling_mm_model": MUP_WIDTH,
    "inkling_text": MUP_WIDTH,
    "minicpm3": LogitOptions(multiplied_by="dim_model_base", divided_by="hidden_size", on_hidden=True),
    "mistral_large4": FINAL_SOFTCAP,
    "mpt": IGNORED,
    "muse_glimmer": MULTIPLIED_AND_CAPPED,
    "muse_spark": MULTIPLIED_AND_CAPPED,
    "nanochat": FINAL_SOFTCAP,
    "paligemma": FINAL_SOFTCAP,
    "recurrent_gemma": LogitOptions(softcap="logits_soft_cap"),
    "vaultgemma": FINAL_SOFTCAP,
    "xlstm": LogitOptions(softcap="output_logit_soft_cap"),
}

# What neither a scale nor a softcap can say, and no option does.
OTHERWISE = {"chameleon": "gives the tokens of images the lowest logits"}

ABOUT_LOGITS = re.compile(
    r"logit|soft_?cap|(^|_)mup(_|$)|head_(scale|scaling|multiplier)|output_(scale|scaling|multiplier)|dim_model_base"
)
ABOUT_OTHERS = re.compile(r"attn|attention|router|gate_|mlp_|_init|_keep|_to_logits|contrastive")  # of attention, ...
YOURSELF = "Pass logit_scale and softcap yourself, as the model's forward has them"


def logit_transform_of(config: Any) -> LogitTransform:
    """What a model does to its logits, for every loss and for `token_logprobs`: `**logit_transform_of(model.config)`.

    Gemma caps its logits, Granite divides them, Cohere multiplies them. A loss that leaves this out trains on other
    probabilities than the model has. With `x = hidden @ weight.T + bias`, where `hidden` is the last hidden state of
    the model's base and `weight` its head, the logits that the model returns are

        softcap * tanh(logit_scale * x / softcap)        without a softcap: logit_scale * x

    So these arguments belong to a loss from hidden states, or from the head's own output. The `logits` that a model
    returns are transformed already: pass them without. MiniCPM3 and Inkling scale the hidden states before a head
    without a bias, which is the same; what reaches their head is scaled already, too.

    Args:
        config: the `config` of a decoder-only model of transformers, or of a multi-modal one, whose text config is
            read. transformers itself is not needed.

    Returns:
        `{"logit_scale": ..., "softcap": ...}`, with 1.0 and None where the model returns its head's output.

    Raises:
        ValueError: an option may be about logits, and the model type is not known to apply or to ignore it; or the
            model does what a scale and a softcap cannot say.
    """
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        remedy = ". Pass its config" if hasattr(config, "config") else ""
        raise TypeError(f"config: expected a model's config, with a model_type; got {checks.describe(config)}{remedy}")
    if model_type not in LOGIT_OPTIONS:
        _refuse_unknown(config)
        return LogitTransform(logit_scale=1.0, softcap=None)
    options = LOGIT_OPTIONS[model_type]
    text = _text_config(config)
    if isinstance(text, dict):
        raise TypeError(f"config.text_config: expected a config; got {checks.describe(text)}")
    scale = _positive(text, options.multiplied_by, 1.0) / _positive(text, options.divided_by, 1.0)
    softcap = _positive(text, options.softcap, None)
    tokens = getattr(text, options.tokens, None) if options.tokens else None
    if tokens is not None and tokens < text.vocab_size:
        raise ValueError(
            f"config.{options.tokens}: expected all {text.vocab_size} rows of the head to be tokens; got {tokens} of "
            f"{model_type!r}. Pass vocab_size={tokens}, logit_scale={scale} and softcap={softcap} yourself"
        )
    return LogitTransform(logit_scale=scale, softcap=softcap)


def _text_config(config: Any) -> Any:
    """The part that describes the language model: of most models, the config itself."""
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", None) or config


def _positive(config: Any, name: str | None, default: Any) -> Any:
    """The value of an option; the default where the model has no such option, or where it is None."""
    value = getattr(config, name, None) if name else None
    if value is None:
        return default
    return float(checks.number(f"config.{name}", value, "what the model does to its logits", above=0))


def _refuse_unknown(config: Any) -> None:
    """Refuses a model type without an entry if it does something to its logits, or may."""
    text = _text_config(config)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text)):
        raise ValueError(
            f"config: expected a decoder-only model; got {config.model_type!r}, an encoder-decoder model, which may "
            f"scale its hidden states or add to its logits without an option that says so. {YOURSELF}"
        )
    if config.model_type in OTHERWISE:
        raise ValueError(
            f"config: expected a model that scales or caps its logits, or neither; got {config.model_type!r}, which "
            f"{OTHERWISE[config.model_type]}. Use the loss from its logits"
        )
    for part in _parts(config, text):
        for name in filter(ABOUT_LOGITS.search, dir(part)):  # with the defaults and properties of its class
            value = getattr(part, name)
            if not ABOUT_OTHERS.search(name) and _active(value):
                raise ValueError(
                    f"config.{name}: expected no option that may be about logits, of a model type that "
                    f"logit_transform_of does not know; got {value!r} of {config.model_type!r}. {YOURSELF}"
                )


def _parts(config: Any, text: Any) -> list[Any]:
    """A config, its text config, and other configs in it, such as the language model's under a name of its own."""
    inner = [value for value in vars(config).values() if isinstance(getattr(value, "model_type", None), str)]
    return [config, *(part for part in (text, *inner) if part is not config)]


def _active(value: Any) -> bool:
    """Whether an option's value may do something: it is not None, not False, no scale of 1, and no method."""
    neutral = value is None or value is False or callable(value) or (type(value) in (int, float) and value == 1)
    return not neutral
