"""Which models GSPOTrainer trains: every causal architecture of transformers, in small, against its own logits."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from causal_models import NOT_BUILT, VOCABULARY, sweep, tiny_model
from modes import DEFAULT_MODE
from torch import Tensor
from trl_trainers import Build, OwnLogits, classes, reads_hidden_states

from gspo_kernels.integrations.transformers import IGNORED, LOGIT_OPTIONS

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the models' own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
LOSS = 2e-5  # a ratio of two sequences, from log-probabilities of size 20 in float32
GRADIENT = 1e-5  # of the largest element: that is what float32 leaves of two backwards of some models
# Embeddings differ by up to 1.7e-5, losses by 1e-6. These do not run in float64: which is nearer is not known.
GRADIENT_OF = dict.fromkeys(("inkling2_loop", "inkling2_loop_text", "inkling2_text"), 2e-5)

SEED = 9  # of dropout
# In training it takes one length alone, and draws its hashes and dropout from the clock: not with these options.
REFORMER: dict[str, Any] = {
    "axial_pos_embds": False, "hash_seed": 1, "hidden_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# What makes each option change log-probabilities by much; a multiplier of 1.0 is what the sweep has.
TRANSFORMED: dict[str, dict[str, Any]] = {
    "cohere2": {"logit_scale": 0.3},
    "falcon_h1": {"lm_head_multiplier": 0.4},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.3},
    "inkling_text": {"logits_mup_width_multiplier": 3.0, "unpadded_vocab_size": VOCABULARY},
    "minicpm3": {"dim_model_base": 8},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "muse_glimmer": {"final_logit_softcapping": 2.0, "output_multiplier": 0.4},
}


class Pair(NamedTuple):
    """One trainer of each class, which compute losses of any model that is passed to them."""

    trl: Any
    ours: Any


@pytest.fixture
def pair(build: Build) -> Pair:
    options = {"importance_sampling_level": "sequence", "epsilon": 0.5, "loss_type": "grpo", "beta": 0.0}
    return Pair(*(build(cls, **options) for cls in classes()))


def batch(model: Any, trainer: Any) -> dict[str, Any]:
    """Two ragged sequences, a few percent off-policy."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=draw)
    inputs = {"prompt_ids": ids[:, :4], "completion_ids": ids[:, 4:]}
    inputs |= {name.replace("ids", "mask"): torch.ones_like(x) for name, x in inputs.items()}
    inputs["prompt_mask"][0, :2] = 0
    inputs["completion_mask"][1, 3:] = 0
    inputs |= {"advantages": torch.tensor([1.0, -0.7]), "num_sequences_in_batch": torch.tensor(4.0)}
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, attended, 4)
    return inputs | {"old_per_token_logps": now + 0.05 * torch.randn(now.shape, generator=draw)}


def step(trainer: Any, model: Any, called: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of `model`, where the trainer calls `called`."""
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    model.zero_grad()
    torch.manual_seed(SEED)
    loss = trainer._compute_loss(called, dict(inputs))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differences(pair: Pair, model: Any) -> list[str]:
    """What of our loss and gradients is not that of TRL's trainer on the model's own logits."""
    own = OwnLogits(model.train(), pair.ours.temperature, SEED)
    inputs = batch(own, pair.trl)
    (loss, gradients), (our_loss, ours) = (
        step(pair.trl, model, own, inputs),
        step(pair.ours, model, model, inputs),
    )
    found = []
    if not abs(our_loss - loss) <= LOSS:
        found.append(f"loss {our_loss:.7f}, not {loss:.7f}")
    largest = max(g.abs().max() for g in gradients.values())
    assert largest > 1e-4
    for name, gradient in gradients.items():
        error = (ours[name] - gradient).abs().max() / largest if name in ours else torch.tensor(1.0)
        if not error <= GRADIENT_OF.get(model.config.model_type, GRADIENT):
            found.append(f"gradient of {name}: {error:.1e}")
    return found


def logits_of(model_type: str) -> str:
    """The row of the page's table: what the model does to its head's output."""
    options = LOGIT_OPTIONS.get(model_type, IGNORED)
    if options.on_hidden:
        return "scaled before the head"
    if options.softcap and options.multiplied_by:
        return "scaled and capped"
    return "capped" if options.softcap else "scaled" if options != IGNORED else "the head's output"


def table(trained: list[str], refused: dict[str, str]) -> dict[str, set[str]]:
    """The rows of the page: what is trained, by what the model does to its logits, and what is not, by reason."""
    rows: dict[str, set[str]] = {}
    for model_type in trained:
        rows.setdefault(logits_of(model_type), set()).add(model_type)
    for model_type, reason in refused.items():
        rows.setdefault(reason, set()).add(model_type)
    return rows


def test_every_causal_model(pair: Pair) -> None:
    from gspo_kernels.integrations.trl.models import REFUSED_TYPES, check_model

    built = sweep()
    built.models["reformer"] = tiny_model("reformer", **REFORMER)
    trained, wrong, refused = list[str](), dict[str, list[str]](), {n: f"not tried: {r}" for n, r in NOT_BUILT.items()}
    for model_type, model in built.models.items():
        try:
            check_model(model, torch.device("cpu"))
        except ValueError as error:
            assert REFUSED_TYPES[model_type] in str(error)
            refused[model_type] = f"refused: {REFUSED_TYPES[model_type]}"
            continue
        messages = differences(pair, model)
        trained.append(model_type)
        if messages:
            wrong[model_type] = messages
    assert wrong == {}
    assert routers(built.models) == {}
    rows = table(trained, refused)
    shown = "\n".join(f"| {row} | {', '.join(f'`{x}`' for x in sorted(rows[row]))} |" for row in sorted(rows))
    on_page = rows_of_page(PAGE.read_text())
    known, here = set().union(*on_page.values()), set().union(*rows.values())
    wanted = {row: types & here for row, types in on_page.items() if types & here}  # other versions have other models
    found = {row: types & known for row, types in rows.items() if types & known}
    assert "llama" in known and found == wanted, f"docs/trl.md: expected these rows\n{shown}"


def routers(models: dict[str, Any]) -> dict[str, bool]:
    """Models that return the loss of their router and are refused it, or the other way around."""
    from gspo_kernels.integrations.trl.models import returns_router_loss

    found: dict[str, bool] = {}
    for model_type, model in models.items():
        dense = model_type in ("doge", "flint")  # with the options of the sweep, they have no router
        if hasattr(model.config.get_text_config(), "output_router_logits") and not dense:
            with torch.no_grad():
                output = model(input_ids=torch.ones(1, 4).long(), output_router_logits=True, use_cache=False)
            returned = getattr(output, "aux_loss", None) is not None
            if returned != returns_router_loss(type(model)):
                found[model_type] = returned
    return found


def rows_of_page(text: str) -> dict[str, set[str]]:
    """The rows of the page's table of models: what is in the first column, and the model types of the second."""
    section = text.split("## Models")[-1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \|$", section, re.MULTILINE)
    return {name: set(re.findall("`([^`]+)`", types)) for name, types in rows}


@pytest.mark.parametrize("model_type", TRANSFORMED)
def test_models_that_transform_their_logits(pair: Pair, model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    from gspo_kernels.integrations.trl.models import check_model, transform_at_head

    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers has no such model")
    model = tiny_model(model_type, **TRANSFORMED[model_type])
    check_model(model, torch.device("cpu"))
    plain = {"logit_scale": 1.0, "softcap": None}
    assert (transform_at_head(model.config) == plain) == LOGIT_OPTIONS[model_type].on_hidden
    assert differences(pair, model) == []
    if not LOGIT_OPTIONS[model_type].on_hidden:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gspo_kernels.integrations.trl.trainer.transform_at_head", lambda config: plain)
            assert len(differences(pair, model)) > 2, "the test sees a transform that is left out"


def test_several_calls_of_the_head(pair: Pair) -> None:
    """A model that calls its head twice is refused when the trainer is created; nothing goes on silently."""
    model = tiny_model("llama")

    class Twice(torch.nn.Module):
        config, get_output_embeddings = model.config, model.get_output_embeddings

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: Any) -> Any:
            self.inner(**inputs)
            return self.inner(**inputs)

    with pytest.raises(
        RuntimeError, match=r"^model: expected Twice to call its LM head once in a forward; got 2 calls"
    ):
        pair.ours._get_per_token_logps_and_entropies(Twice(), torch.ones(1, 4).long(), torch.ones(1, 4).long(), 2)


def test_an_error_at_the_head_leaves_the_model_as_it_was() -> None:
    from gspo_kernels.linear.model_head import run_at_head

    model, ids = tiny_model("llama").eval(), torch.ones(1, 4).long()
    expected = model(ids).logits

    def job(hidden: Tensor, head: torch.nn.Module) -> Any:
        raise KeyError("of the job")

    with pytest.raises(KeyError, match="of the job"):
        run_at_head(model, model, job, {"input_ids": ids})
    assert torch.equal(model(ids).logits, expected)


# ---- refused when the trainer is created


def scaled(model: Any) -> Any:
    """The model as a class of its own, as remote code has, whose logits are twice what its config says."""

    class Scaled(type(model)):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            output.logits = 2 * output.logits
            return output

    model.__class__ = Scaled
    return model


def broken(model: Any) -> Any:
    class Broken(type(model)):
        def forward(self, *args: Any, **options: Any) -> Any:
            output = super().forward(*args, **options)
            if output.logits.shape[1] != options["input_ids"].shape[1]:
                raise IndexError("every position is needed")
            return output

    model.__class__ = Broken
    return model


def quantized(model: Any) -> Any:
    class Linear4bit(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden)

    model.lm_head.__class__ = Linear4bit
    return model


def unknown_option(model: Any) -> Any:
    model.config.final_logit_scaling = 0.5
    return model


def hooked_head(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def replaced_forward(model: Any) -> Any:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * forward(hidden)
    return model


def tuples(model: Any) -> Any:
    model.config.return_dict = False
    return model


def without_head(model: Any) -> Any:
    model.get_output_embeddings = lambda: None
    return model


def on_devices(model: Any) -> Any:
    model.hf_device_map = {"model": 0, "lm_head": 1}
    return model


def padded_vocabulary(_: Any) -> Any:
    return tiny_model("inkling_text", unpadded_vocab_size=VOCABULARY - 4)


REFUSED = {
    scaled: r"^model: expected logits that are the LM head's output with .*; got Scaled, whose logits differ .* by",
    broken: r"^model: expected a model that runs .*; got Broken, with IndexError: every position is needed",
    quantized: r"^model: expected an LM head that is a torch.nn.Linear, .* not quantized; got .*Linear4bit",
    unknown_option: r"^model: expected logits .*LlamaForCausalLM: config.final_logit_scaling: expected",
    hooked_head: r"^model: expected logits .*; got LlamaForCausalLM, whose logits differ",
    replaced_forward: r"^model: expected logits .*; got LlamaForCausalLM, whose logits differ",
    tuples: r"^config.return_dict: expected True, .* got False of LlamaForCausalLM",
    without_head: r"^model: expected a causal model with an LM head .*; got LlamaForCausalLM",
    on_devices: r"^device_map: expected one device, .*; got 0, 1",
    padded_vocabulary: r"^model: expected logits .*config.unpadded_vocab_size: expected all 48",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused_models(change: Any) -> None:
    from gspo_kernels.integrations.trl.models import check_model

    with pytest.raises(ValueError, match=REFUSED[change]):
        check_model(change(tiny_model("llama")), torch.device("cpu"))


def test_own_classes_are_tried(pair: Pair) -> None:
    """Where their parameters are on the trainer's device; the mode and gradients of the model are left as they were."""
    from gspo_kernels.integrations.trl.models import check_model

    model = tiny_model("gemma2", final_logit_softcapping=2.0).train()
    model.__class__ = type("Own", (type(model),), {"__module__": "remote"})
    check_model(model, torch.device("cpu"))
    assert model.training and all(p.grad is None for p in model.parameters())
    check_model(scaled(tiny_model("llama")), torch.device("cuda"))  # not there yet: not tried


def test_logits_that_a_model_changes_in_place(pair: Pair) -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from gspo_kernels.integrations.trl.models import check_model

    class InPlace(type(tiny_model("llama"))):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
            hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden).mul_(1.0))

    model = tiny_model("llama")
    model.__class__ = InPlace
    check_model(model, torch.device("cpu"))
    assert differences(pair, model) == []


def test_the_loss_of_a_router_that_the_class_does_not_compute(build: Build) -> None:
    """As of Llama 4: refused when the trainer is created. As of a dense config: at the first step."""
    from gspo_kernels.integrations.trl.models import check_router

    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: expected 0.0, .* weight for Llama4ForCausalLM"):
        check_router(tiny_model("llama4_text"))
    ours = build(classes()[1])
    assert not ours.aux_loss_enabled
    ids = torch.ones(1, 4, dtype=torch.long)
    model = tiny_model("mixtral")
    model.register_forward_hook(lambda module, args, output: setattr(output, "aux_loss", None))
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: .* the model returned no aux_loss"):
        ours._get_per_token_logps_and_entropies(model, ids, ids, 2, compute_aux_loss=True)


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "recurrent_gemma", "roberta", "xlstm"])
def test_where_trl_is_off(pair: Pair, model_type: str) -> None:
    """From 1.15 on, TRL multiplies the last hidden state with the head, which leaves out what these models do."""
    if not reads_hidden_states():
        pytest.skip("TRL 1.14 reads logits, and the kernels of 1.15 need a GPU")
    from trl.trainer import utils

    options = {"xlstm": {"output_logit_soft_cap": 2.0}, "recurrent_gemma": {"logits_soft_cap": 2.0}}
    model = tiny_model(model_type, **options.get(model_type, {})).eval()
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    own = OwnLogits(model, pair.ours.temperature)
    with torch.no_grad():
        expected, ours = (
            t._get_per_token_logps_and_entropies(called, ids, torch.ones_like(ids), 4)[0]
            for t, called in ((pair.trl, own), (pair.ours, model))
        )
        utils.add_fused_lm_head(model, pair.trl.temperature, outputs=("log_probs", "entropy"))
        theirs, _, _ = pair.trl._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 4)
    assert (ours - expected).abs().max() < 1e-5
    assert (theirs - expected).abs().max() > 0.05


def test_refused_when_created(build: Build) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gspo_kernels.integrations.trl.models.REFUSED_TYPES", {"qwen3": "a reason"})
        with pytest.raises(
            ValueError,
            match=r"^model: expected an LM head of which logits are products with one weight; got Qwen3.*: a reason",
        ):
            build(classes()[1])
