"""What `logit_transform_of` reads from a config, and what it refuses; transformers is not needed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from modes import DEFAULT_MODE

from gspo_kernels import logit_transform_of

pytestmark = DEFAULT_MODE
PLAIN = {"logit_scale": 1.0, "softcap": None}


def config(model_type: str, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, vocab_size=64, **options)


def wrapped(model_type: str, text: SimpleNamespace, **options: Any) -> SimpleNamespace:
    return config(model_type, text_config=text, get_text_config=lambda decoder: text, **options)


@pytest.mark.parametrize(("found", "scale", "softcap"), [
    (config("gemma2", final_logit_softcapping=30.0, attn_logit_softcapping=50.0), 1.0, 30.0),
    (config("gemma3_text", final_logit_softcapping=None), 1.0, None),
    (config("granite", logits_scaling=8), 1 / 8, None),
    (config("hyperclovax", logits_scaling=8), 8.0, None),
    (config("cohere", logit_scale=0.0625), 0.0625, None),
    (config("falcon_h1", lm_head_multiplier=0.5), 0.5, None),
    (config("minicpm3", hidden_size=2560, dim_model_base=256), 0.1, None),
    (config("inkling_text", logits_mup_width_multiplier=24.0, unpadded_vocab_size=64), 1 / 24, None),
    (wrapped("muse_spark", config("muse_spark_text", output_multiplier=0.2, final_logit_softcapping=20)), 0.2, 20.0),
    (SimpleNamespace(model_type="paligemma", text_config=config("gemma2", final_logit_softcapping=9.0)), 1.0, 9.0),
])  # fmt: skip
def test_scale_and_softcap_are_read(found: Any, scale: float, softcap: float | None) -> None:
    assert logit_transform_of(found) == {"logit_scale": scale, "softcap": softcap}
    assert all(isinstance(value, float) for value in logit_transform_of(found).values() if value is not None)


@pytest.mark.parametrize("found", [
    config("qwen3", output_router_logits=True, num_logits_to_keep=2, attn_logit_softcapping=50.0),
    config("made_up", final_logit_softcapping=None, logit_scale=1.0, logits_scaling=1, use_mup=False),
    config("mpt", logit_scale="inv_sqrt_d_model"),
    config("laguna", moe_router_logit_softcapping=30.0),
    wrapped("aya_vision", config("cohere2", logit_scale=0.0625)),
    wrapped("llava", config("llama"), logit_scale_init_value=2.6592),
])  # fmt: skip
def test_options_that_change_nothing_are_plain(found: Any) -> None:
    assert logit_transform_of(found) == PLAIN


@pytest.mark.parametrize(("name", "value"), [
    ("final_logit_softcapping", 30.0), ("logits_soft_cap", 0.0), ("logit_scale", "inv_sqrt_d_model"), ("use_mup", True),
    ("logits_scaling", 8), ("lm_head_multiplier", 0.5), ("mup_width_multiplier", 8.0), ("dim_model_base", 256),
    ("output_multiplier_scale", 0.5),
])  # fmt: skip
def test_an_option_that_may_be_about_logits_is_refused(name: str, value: Any) -> None:
    expected = rf"config\.{name}: expected .* got {value!r} of 'made_up'\. Pass logit_scale and softcap yourself"
    with pytest.raises(ValueError, match=expected):
        logit_transform_of(config("made_up", **{name: value}))
    with pytest.raises(ValueError, match=expected):
        logit_transform_of(wrapped("made_up", config("llama", **{name: value})))


def test_an_option_of_the_config_class_is_an_option() -> None:
    class Config:
        model_type = "made_up"
        final_logit_softcapping = 30.0

        def logits_processor(self) -> None: ...

    with pytest.raises(ValueError, match=r"config\.final_logit_softcapping: .* got 30\.0 of 'made_up'"):
        logit_transform_of(Config())


def test_a_language_model_under_another_name_is_read() -> None:
    """As remote code has it: `get_text_config` of transformers does not know `llm_config`, and returns the whole."""
    inner = config("gemma2", final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match=r"config\.final_logit_softcapping: .* got 30\.0 of 'made_up'"):
        logit_transform_of(config("made_up", llm_config=inner))
    audio = config("wav2vec2", inputs_to_logits_ratio=320)
    assert logit_transform_of(config("made_up", llm_config=config("llama"), audio_config=audio)) == PLAIN


def test_a_dictionary_in_place_of_a_text_config_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^config\.text_config: expected a config; got dict \{'final_logit"):
        logit_transform_of(config("paligemma", text_config={"final_logit_softcapping": 30.0}))


def test_what_a_scale_and_a_softcap_cannot_say_is_refused() -> None:
    cut = config("inkling2_text", final_logit_softcapping=30.0, unpadded_vocab_size=60)
    with pytest.raises(ValueError, match=r"config\.unpadded_vocab_size: .* all 64 .* got 60 .* Pass vocab_size=60, "):
        logit_transform_of(cut)
    seq2seq = config("t5", is_encoder_decoder=True)
    for found in (seq2seq, wrapped("t5", seq2seq)):
        with pytest.raises(ValueError, match="expected a decoder-only model; got 't5'"):
            logit_transform_of(found)
    with pytest.raises(ValueError, match=r"got 'chameleon', which gives .* Use the loss from its logits"):
        logit_transform_of(wrapped("chameleon", config("chameleon")))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_or_softcap_is_a_number_above_0(value: float) -> None:
    for found in (config("gemma2", final_logit_softcapping=value), config("granite", logits_scaling=value)):
        with pytest.raises(ValueError, match=r"config\.\w+: expected .* a finite number above 0; got"):
            logit_transform_of(found)


def test_what_is_not_a_config_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"config: expected a model's config, .* got SimpleNamespace .* Pass its config"
    ):
        logit_transform_of(SimpleNamespace(config=config("gemma2")))
    with pytest.raises(TypeError, match="config: expected a model's config, with a model_type; got dict"):
        logit_transform_of({"model_type": "gemma2"})
