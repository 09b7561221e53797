"""`logit_transform_of` and the log-probabilities of models: every causal architecture of transformers, in small.

The truth is the model itself: `log_softmax(model(...).logits)` in float64, and its gradient by the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from causal_models import NOT_BUILT, Sweep, one_thread, sweep, tiny_model, token_ids
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import linear_token_logprobs, logit_transform_of, token_logprobs
from gspo_kernels.integrations.transformers import IGNORED, LOGIT_OPTIONS

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the models' own
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
]

# Of each model type with an option about logits: values that change log-probabilities by much, for logits of size 4.
CAPPED: dict[str, Any] = {"final_logit_softcapping": 2.0}
OPTIONS_OF: dict[str, dict[str, Any]] = {
    "beam gemma2 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text": CAPPED,
    "mistral_large4 nanochat paligemma vaultgemma": CAPPED,
    "inkling2 inkling2_text": CAPPED | {"unpadded_vocab_size": 48},
    "muse_glimmer muse_spark": CAPPED | {"output_multiplier": 0.4},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "xlstm": {"output_logit_soft_cap": 2.0},
    "cohere cohere2 cohere2_moe cohere_compass cohere_compass_text": {"logit_scale": 0.3},
    "falcon_h1": {"lm_head_multiplier": 0.4},
    "granite granite_docling granite_swa granite4_vision": {"logits_scaling": 4.0},
    "granitemoe granitemoe_swa granitemoehybrid granitemoeshared": {"logits_scaling": 4.0},
    "hyperclovax hyperclovax_vision_v2": {"logits_scaling": 0.3},
    "inkling_text": {"logits_mup_width_multiplier": 3.0, "unpadded_vocab_size": 48},
    "minicpm3": {"dim_model_base": 8},
}
OPTIONS = {model_type: options for types, options in OPTIONS_OF.items() for model_type in types.split()}
NOT_APPLIED: dict[str, dict[str, Any]] = {
    "afmoe": {"mup_enabled": True},
    "aya_vision": {"logit_scale": 0.3},
    "cohere2_vision": {"logit_scale": 0.3},
    "gemma3": CAPPED,
    "mpt": {"logit_scale": 0.3},
}
WITHOUT_OPTIONS = ("nemotron_h",)
SCALED_BEFORE_THE_HEAD = ("inkling_text", "minicpm3")
NOT_IN_FLOAT64 = {
    "inkling2": "computes its short convolutions in float32",
    "inkling2_text": "computes its short convolutions in float32",
    "xglm": "masks with a number that float64 does not hold",
}

# Their heads have a dense layer, an activation and a norm before the product, as BERT's has.
HEADS_WITH_LAYERS = (
    "bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
NOT_ONE_PRODUCT = {"prophetnet": "its head multiplies several streams, of which one is the logits"}
NOT_TRIED = {"inkling_mm_model": "needs scipy", "gemma3n": "needs timm"}
# Of transformers 5.24; `make test-versions` trains them in TRL.
NOT_TRIED |= dict.fromkeys(("inkling2_loop", "inkling2_loop_text"), "newer than constraints.txt")
PLAIN = {"logit_scale": 1.0, "softcap": None}

# Of a log-probability of size 10, and of a gradient's largest element, by the dtype of the model's logits: some models
# return float32 whatever their weights are.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


class Truth(NamedTuple):
    """What one forward of a model has. Of hidden states that are scaled before the head, the output has no gradient."""

    hidden: Tensor  # [..., D]: what the head gets, before it is scaled
    output: Tensor  # [..., V] of the head
    logits: Tensor  # [..., V] of the model
    token_ids: Tensor  # [rows]
    logprobs: Tensor  # [rows]
    weights: Tensor  # [rows], of the log-probabilities in the sum whose gradients follow
    by_hidden: Tensor
    by_output: Tensor | None


def truth_of(model: Any) -> Truth:
    head, scaled = model.get_output_embeddings(), model.config.model_type in SCALED_BEFORE_THE_HEAD
    model.train(model.config.model_type == "xlstm")  # whose softcap has no gradient in evaluation mode
    logits, base, hidden, output = forward(model)
    rows = torch.arange(logits.shape[:-1].numel())
    ids, weights = rows * 7 % logits.shape[-1], torch.cos(1.0 + rows.double())
    logprobs = logits.flatten(0, -2).double().log_softmax(-1)[rows, ids]
    if scaled:
        assert base is not None and head.bias is None
        hidden, output = base, base @ head.weight.T
    by_hidden, by_output = torch.autograd.grad((logprobs * weights).sum(), (hidden, output), allow_unused=scaled)
    return Truth(hidden, output, logits, ids, logprobs.detach(), weights, by_hidden, by_output)


def forward(model: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(logits, the base's last hidden state where the base is called as a module, input and output of the head)"""
    seen: dict[str, Any] = {}
    hooks = [
        model.base_model.register_forward_hook(lambda _, inputs, output: seen.update(base=hidden_of(output))),
        model.get_output_embeddings().register_forward_hook(
            lambda _, inputs, output: seen.update(hidden=inputs[0], output=output)
        ),
    ]
    logits = model(input_ids=token_ids(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen.get("base"), seen["hidden"], seen["output"]


def hidden_of(output: Any) -> Any:
    """None where the base is the whole model."""
    return output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)


def wrong(model: Any, **transform: Any) -> list[str]:
    """What of ours is not the model's own. `transform` replaces what its config says."""
    options = transform or dict(logit_transform_of(model.config))
    true, head = truth_of(model), model.get_output_embeddings()
    tolerance = TOLERANCE[true.logits.dtype]
    backend = "reference" if true.hidden.dtype == torch.float64 else None
    found: list[str] = []

    def compare(name: str, ours: Tensor, theirs: Tensor, size: float = 1.0) -> None:
        error = float((ours.double() - theirs.double()).abs().max()) / size
        if not error <= tolerance:
            found.append(f"{name}: {error:.1e}")

    def differentiate(name: str, value: Tensor, gradient: Tensor | None, logprobs_of: Any) -> None:
        leaf = value.detach().flatten(0, -2).requires_grad_()
        logprobs = logprobs_of(leaf)
        compare(name, logprobs, true.logprobs)
        if gradient is not None:
            ours = torch.autograd.grad((logprobs * true.weights).sum(), leaf)[0]
            compare(f"gradient by {name}", ours, gradient.flatten(0, -2), float(gradient.abs().max()))

    def from_logits(leaf: Tensor) -> Tensor:
        return token_logprobs(leaf, true.token_ids, backend=backend, **options).logprobs

    def from_hidden(leaf: Tensor) -> Tensor:
        return linear_token_logprobs(
            leaf, head.weight.detach(), true.token_ids, bias=detached(head.bias), backend=backend, **options
        ).logprobs

    logits = true.logits.detach().flatten(0, -2)
    compare("logits", token_logprobs(logits, true.token_ids, backend=backend).logprobs, true.logprobs)
    differentiate("output", true.output, true.by_output, from_logits)
    differentiate("hidden", true.hidden, true.by_hidden, from_hidden)
    return found


def detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


@pytest.mark.parametrize("model_type", [*OPTIONS, *NOT_APPLIED, *WITHOUT_OPTIONS])
def test_log_probabilities_are_those_of_the_model(model_type: str) -> None:
    """In float32 and float64. With the transform left out, they are others: these caps and scales matter."""
    options = (OPTIONS | NOT_APPLIED).get(model_type, {})
    model = tiny_model(model_type, **options)
    assert (logit_transform_of(model.config) != PLAIN) == (model_type in OPTIONS)
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64 and model_type in NOT_IN_FLOAT64:
            continue
        model = model.to(dtype)
        assert wrong(model) == []
        if model_type in OPTIONS:
            left_out = {message.split(":")[0] for message in wrong(model, **PLAIN)}
            assert left_out >= {"output", "hidden", "gradient by hidden"}, "the test would not see it"


def test_every_entry_of_the_table_is_tried() -> None:
    tried = {**OPTIONS, **NOT_APPLIED}
    assert set(LOGIT_OPTIONS) - set(NOT_TRIED) == set(tried)
    for model_type, names in LOGIT_OPTIONS.items():
        if model_type not in NOT_TRIED:
            read = {name for name in names if isinstance(name, str)} - {"hidden_size"}
            assert names is IGNORED or read <= set(tried[model_type]), model_type


@pytest.fixture(scope="module")
def built() -> Sweep:
    return sweep()


@pytest.mark.only_with_all
def test_every_causal_model_that_can_be_built(built: Sweep) -> None:
    """With the options that its config has by default. By default the trainer's sweep runs, over the same models."""
    assert {name for name in built.failures if name not in NOT_BUILT} == {"gemma3n"}, "needs timm"
    found: dict[str, list[str]] = {}
    for model_type, model in built.models.items():
        if model_type in NOT_ONE_PRODUCT:
            continue
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 or model_type not in NOT_IN_FLOAT64:
                messages = wrong(model.to(dtype))
                if messages:
                    found[f"{model_type}, {dtype}"] = messages
    assert found == {}


@pytest.mark.only_with_all
def test_what_the_head_multiplies_is_the_last_hidden_state(built: Sweep) -> None:
    """But where the table says that it is scaled, and in heads like BERT's: no scale hides from the table."""
    found = set()
    for model_type, model in built.models.items():
        with torch.no_grad():
            _, base, hidden, _ = forward(model.float())
        if base is not None and not torch.equal(base, hidden):
            found.add(model_type)
    assert found == {*HEADS_WITH_LAYERS.split(), *SCALED_BEFORE_THE_HEAD}
    assert {name for name, options in LOGIT_OPTIONS.items() if options.on_hidden} - {*NOT_TRIED} == {
        *SCALED_BEFORE_THE_HEAD
    }
