"""vLLM's own outputs, recorded by `make test-vllm ARGS=--record`: what is read from them is what its trainer computed.

Objects are rebuilt with the class names and the fields that they had. The trainer's log-probabilities of the same
tokens were recorded beside them.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import recorded
import test_engines as fakes
import torch
from modes import DEFAULT_MODE

from gspo_kernels import from_vllm, gspo_loss

pytestmark = DEFAULT_MODE

FILES = sorted(path.stem for path in recorded.FOLDER.glob("*.json"))
WHOLE = [name for name in FILES if "trainer_logprobs" in recorded.load(name)]
PARTS = [name for name in FILES if "refused" in recorded.load(name)]


def test_every_kind_is_there() -> None:
    assert {name.partition("_")[0] for name in FILES} == {"offline", "server"}
    assert len(WHOLE) >= 18 and len(PARTS) >= 10 and set(WHOLE) | set(PARTS) == set(FILES)
    said = {each["versions"]["vllm"] for each in map(recorded.load, FILES)}
    assert len(said) == 1, "recorded with several versions: make test-vllm ARGS=--record"


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_the_machine_is_recorded(name: str) -> None:
    text = (recorded.FOLDER / f"{name}.json").read_text()
    assert not re.search(r"/(tmp|home|root|work|usr|Users)\b|127\.0\.0\.1|localhost|cmpl-|generate-", text)
    assert len(text) < 60_000


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_read(name: str) -> None:
    found = recorded.load(name)
    outputs = recorded.rebuilt(found["outputs"])
    given = found.get("given_prompts")
    rollouts = from_vllm(outputs, prompt_ids=None if given is None else [given])
    assert rollouts.token_ids.tolist() == found["token_ids"]
    assert rollouts.cu_seqlens.tolist() == found["cu_seqlens"]
    assert rollouts.finish_reasons == tuple(found["finish_reasons"])
    assert rollouts.prompt_ids is not None and rollouts.prompt_cu_seqlens is not None
    assert [x.tolist() for x in rollouts.prompt_ids.tensor_split(rollouts.prompt_cu_seqlens[1:-1])] == found["prompts"]
    trainer = torch.tensor(found["trainer_logprobs"])
    assert (rollouts.old_logprobs - trainer).abs().mean() < 1e-5
    batch = rollouts.with_prompts()
    assert batch.token_ids[batch.mask].tolist() == found["token_ids"]
    assert torch.equal(batch.old_logprobs[batch.mask], rollouts.old_logprobs)


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_refused(name: str) -> None:
    found = recorded.load(name)
    outputs = recorded.rebuilt(found["outputs"])
    for i in found["refused"]:
        with pytest.raises((TypeError, ValueError), match=r"stream|part|logprobs"):
            from_vllm(outputs[i])
    for i in found.get("whole", []):
        assert from_vllm(outputs[i]).cu_seqlens.numel() == 2


def test_weight_versions() -> None:
    """The weights were replaced while the responses were under way."""
    found = recorded.load("offline_weight_versions")
    versions = from_vllm(recorded.rebuilt(found["outputs"])).weight_versions
    assert versions is not None
    of_tokens = [label for spans in found["weight_versions"] for label, start, end in spans for _ in range(start, end)]
    assert [versions.labels[i] for i in versions.of_tokens.tolist()] == of_tokens and set(of_tokens) == {"1", "2"}


def test_kept_sets_and_experts() -> None:
    found = recorded.load("offline_kept_sets_and_experts")
    outputs = recorded.rebuilt(found["outputs"])
    rollouts = from_vllm(outputs)
    sets = [row for output in outputs for each in output.outputs for row in each.sampling_mask.token_ids]
    assert rollouts.kept is not None and rollouts.routed_experts is not None
    assert [x.tolist() for x in rollouts.kept.token_ids.tensor_split(rollouts.kept.offsets[1:-1])] == sets
    assert all(token in row for token, row in zip(found["token_ids"], sets, strict=True))
    returned = [torch.from_numpy(each.routed_experts) for output in outputs for each in output.outputs]
    batch = rollouts.with_prompts()
    for rows, begin in zip(returned, batch.cu_seqlens.tolist(), strict=False):
        assert torch.equal(batch.routed_experts[begin : begin + len(rows)].short(), rows.short())
    assert batch.routed_experts.shape == (batch.input_ids.numel(), *returned[0].shape[1:])


def test_the_first_ratios_are_one() -> None:
    """Of recorded responses and logits that give the trainer's log-probabilities: GSPO clips nothing."""
    found = recorded.load("offline_dictionaries")
    rollouts = from_vllm(recorded.rebuilt(found["outputs"]))
    trainer = torch.tensor(found["trainer_logprobs"], dtype=torch.float64)
    rest = torch.log1p(-trainer.exp())  # the probability of all other tokens, on one of two columns
    options = {"cu_seqlens": rollouts.cu_seqlens}
    advantages = torch.tensor([1.0, -1.0]).repeat(2)
    logits, first = torch.stack((trainer, rest), -1).float(), torch.zeros_like(rollouts.token_ids)
    _, stats = gspo_loss(logits, first, advantages, rollouts.old_logprobs, **options)
    assert float(stats.clip_fraction) == 0 and float(stats.ratio_max) == pytest.approx(1, abs=1e-5)


# --- the fakes of test_engines.py -------------------------------------------------------------------------------------

FAKES: dict[str, tuple[Any, list[str]]] = {
    "dictionaries": (fakes.request_outputs(fakes.as_dicts), ["offline_dictionaries", "offline_aborted"]),
    "flat": (fakes.request_outputs(fakes.as_flat), ["offline_flat", "offline_aborted"]),
    "completions": ([fakes.completion_json(0)], ["server_completions", "server_completions_aborted"]),
    "completions, names": ([fakes.completion_json(0, ids=False, as_ids=True)], ["server_completions_names"]),
    "generate": ([fakes.generated_json(0)], ["server_generate", "server_generate_aborted"]),
    "chat": ([fakes.chat_json(0)], ["server_chat", "server_chat_aborted"]),
    "chat, names": ([fakes.chat_json(0, ids=False, as_ids=True)], ["server_chat_names"]),
}


@pytest.mark.parametrize("fake", FAKES)
def test_fakes_have_the_fields_of_the_engine(fake: str) -> None:
    """Each field of a fake is one of the recorded output, with a type that it has there."""
    made, names = FAKES[fake]
    real = {shape for name in names for shape in recorded.shapes(recorded.load(name)["outputs"])}
    invented = set(recorded.shapes(recorded.plain(made))) - real
    assert not invented
