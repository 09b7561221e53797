"""A GPTModel of Megatron-Core in training, in a rank, and what `loss_from_hidden` does with modules around a model.

Megatron is imported inside the functions, which ranks call: the tests' own process has no need of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron_ranks import Found, cross_entropies, model_parallel, padded_vocabulary, with_driver, without_cuda
from ranks import refused
from torch import Tensor

from gspo_kernels import global_count, gspo_loss, linear_gspo_loss, linear_token_logprobs, token_logprobs
from gspo_kernels.integrations.megatron import loss_from_hidden

VOCAB, HIDDEN, HEADS, LAYERS, LENGTH = 61, 16, 4, 2, 12
STEPS, MICRO_BATCHES = 3, 2
CLIP = {"eps_low": 0.03, "eps_high": 0.04}  # steps that change parameters by more than float32 rounds them


@dataclass(frozen=True)
class Way:
    """How a model is trained: by what path, and how its losses are scaled."""

    path: str = "logits"  # "flag" or "hook": from hidden states, without and with `output_processor`
    page: bool = False  # with the code of docs/megatron.md
    scaled: str = "by us"  # "tokens" or "responses": calculate_per_token_loss divides by tokens
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    tied: bool = False
    cp: int = 1  # 2, in the place of data parallelism: without layers, whose attention needs Transformer Engine there

    @property
    def rate(self) -> float:
        """A step after which some responses are clipped, but not all."""
        return 0.003 if self.cp == 1 else 0.1

    @property
    def aggregation(self) -> str:
        return "token_mean" if self.scaled == "tokens" else "sequence_mean"


@dataclass(frozen=True)
class Responses:
    """A micro-batch, or all of them: next-token targets, as Megatron's labels are."""

    tokens: Tensor  # [B, T]
    labels: Tensor
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B]

    def __getitem__(self, sequences: slice) -> Responses:
        return Responses(*(x[sequences] for x in (self.tokens, self.labels, self.mask, self.advantages)))


def all_responses() -> Responses:
    """Eight responses of a step, for 2 ranks and 2 micro-batches: of different lengths, and one without a token."""
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (8, LENGTH + 1), generator=g)
    ends = torch.tensor([12, 5, 7, 3, 9, 3, 4, 11])
    column = torch.arange(LENGTH)
    mask = (column >= 3) & (column < ends[:, None]) & (torch.rand(8, LENGTH, generator=g) < 0.9)
    return Responses(tokens[:, :-1], tokens[:, 1:], mask, torch.randn(8, generator=g, dtype=torch.float64))


def trained(rank: int, ways: list[Way]) -> Found:
    """Three steps of each way over tp 2 and dp 2, and what `loss_from_hidden` does with modules around a model."""
    from drivers import megatron

    of_driver = with_driver(megatron.step)
    with model_parallel(2, 1) as state, without_cuda():
        found = {
            "driver": of_driver,
            "cross entropy": cross_entropies(state),
            "wrapped": {path: wrapped(path, state) for path in ("flag", "hook")},
            "trained": [train(way, state) for way in ways if way.cp == 1],
        }
    with model_parallel(2, 2) as state, without_cuda():
        found["trained"] += [train(way, state) for way in ways if way.cp == 2]
    return found


def built(way: Way, state: Any, **options: Any) -> Any:
    """A GPTModel of Megatron's local layers. Where the installed version has no hook, it gets that of version 0.18."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, params_dtype=way.dtype,
        use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.3,
        tensor_model_parallel_size=state.get_tensor_model_parallel_world_size(),
        sequence_parallel=way.sequence_parallel, calculate_per_token_loss=way.scaled != "by us",
        finalize_model_grads_func=finalize_model_grads, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layers = TransformerBlockSubmodules([layer] * LAYERS, layer_norm=Norm)
    kind = with_hook(GPTModel) if way.path == "hook" else GPTModel
    model = kind(
        config, layers, padded_vocabulary(VOCAB, 2), LENGTH, parallel_output=True,
        share_embeddings_and_output_weights=way.tied,
    )  # fmt: skip
    return model.double() if way.dtype is torch.float64 else model


class Norm(torch.nn.LayerNorm):
    """With the mark by which Megatron sums its gradient over sequence parallelism, as Apex's and TE's have it.

    Megatron-Core refuses torch's own norm there, which has none.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        for x in self.parameters():
            x.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Through(torch.nn.Module):
    """A decoder without layers, whose attention takes neither packed sequences nor context parallelism on a CPU."""

    layers = ()

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        assert input_tensor is None

    def forward(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        return hidden_states


def with_hook(kind: Any) -> Any:
    """`output_processor` as Megatron-Core 0.18 passes it, by name, in the place of its own output layer."""

    class WithHook(kind):  # type: ignore[misc]
        def forward(self, *inputs: Any, output_processor: Any = None, output_processor_context: Any = None,
                    **keywords: Any) -> Any:  # fmt: skip
            self.hook = output_processor, output_processor_context
            return super().forward(*inputs, **keywords)

        def _postprocess(self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Any, *rest: Any,
                         **keywords: Any) -> Any:  # fmt: skip
            processor, context = self.hook
            if processor is None:
                return super()._postprocess(hidden_states, input_ids, position_ids, labels, *rest, **keywords)
            return processor(
                hidden_states=hidden_states, output_layer=self.output_layer,
                output_weight=self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights
                else None,
                labels=labels, loss_mask=keywords["loss_mask"], input_ids=input_ids, position_ids=position_ids,
                attention_mask=keywords["attention_mask"], decoder_input=keywords["decoder_input"],
                inference_context=None, packed_seq_params=keywords["packed_seq_params"], runtime_gather_output=None,
                context=context, compute_language_model_loss=self.compute_language_model_loss,
                scale_logits=lambda logits: logits, config=self.config,
            )  # fmt: skip

    return kind if "output_processor" in kind.forward.__code__.co_varnames else WithHook


def train(way: Way, state: Any) -> Found:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.utils import get_batch_on_this_cp_rank

    gpt = built(way, state)
    if way.cp > 1:
        gpt.decoder = Through()
    initial = {name: x.detach().clone() for name, x in gpt.named_parameters()}
    model = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)
    count = 8 // state.get_data_parallel_world_size()
    mine = all_responses()[state.get_data_parallel_rank() * count :][:count]
    parts = [mine[: count // 2], mine[count // 2 :]]
    positions = torch.arange(LENGTH).expand(count // 2, -1)
    tp_group, cp_group = state.get_tensor_model_parallel_group(), state.get_context_parallel_group()
    with torch.no_grad():
        old = [old_logprobs_of(way, model, x, positions, tp_group) for x in parts]
    masks = [get_batch_on_this_cp_rank({"mask": x.mask}, cp_group=cp_group)["mask"] for x in parts]

    def forward_step(data: Iterator[Any], model: Any) -> tuple[Any, Callable[..., Any]]:
        batch, advantages, normalizer = next(data)
        batch = get_batch_on_this_cp_rank(batch, cp_group=cp_group)
        loss = partial(
            gspo_loss if way.path == "logits" else linear_gspo_loss,
            token_ids=batch["labels"], advantages=advantages, old_logprobs=batch["old_logprobs"],
            mask=batch["loss_mask"], normalizer=normalizer, vocab_size=VOCAB, cp_group=cp_group,
            aggregation=way.aggregation, **CLIP,
        )  # fmt: skip
        if way.path == "logits":
            found = loss(model(batch["tokens"], batch["position_ids"], None), tp_group=tp_group)
        else:
            found = loss_from_hidden(model, loss, batch["tokens"], batch["position_ids"], None)
        log = {"loss": found.loss.detach().clone(), "clip_fraction": found.stats.clip_fraction}
        return found, lambda out: (
            out.loss,
            counted(way, batch["loss_mask"]),
            log,
        )  # Megatron divides the loss in place

    normalizer: Any = normalizer_of(way, masks, state)
    if way.page:
        of_page = code_of_page(masks)
        forward_step = of_page["forward_step of logits" if way.path == "logits" else "forward_step"]
        normalizer = of_page["normalizer"]
    data = [
        (
            {"tokens": x.tokens, "labels": x.labels, "loss_mask": x.mask, "position_ids": positions,
             "old_logprobs": old_logprobs}, x.advantages.to(way.dtype), normalizer,
        )
        for x, old_logprobs in zip(parts, old, strict=True)
    ]  # fmt: skip

    steps = []
    for _ in range(STEPS):
        model.zero_grad_buffer()
        logged = forward_backward_no_pipelining(
            forward_step_func=forward_step, data_iterator=iter([(dict(x), *rest) for x, *rest in data]), model=model,
            num_microbatches=MICRO_BATCHES, seq_length=LENGTH, micro_batch_size=2,
        )  # fmt: skip
        gradients = {name: x.main_grad.clone() for name, x in gpt.named_parameters()}
        assert all(x.grad is None for x in gpt.parameters()), "Megatron added it to main_grad"
        clipped = [log["clip_fraction"] * x.mask.any(-1).sum() / way.cp for log, x in zip(logged, parts, strict=True)]
        steps.append((sum(log["loss"] for log in logged), sum(clipped), gradients))
        with torch.no_grad():
            for x in gpt.parameters():
                x -= way.rate * x.main_grad
    assert gpt.post_process, "put back"
    return {"initial": initial, "steps": steps, "parameters": dict(gpt.named_parameters())}


def code_of_page(masks: list[Tensor]) -> dict[str, Any]:
    """What docs/megatron.md defines, for this vocabulary and clip range. The last `forward_step` has hidden states."""
    text = (Path(__file__).parents[2] / "docs" / "megatron.md").read_text()
    names: dict[str, Any] = {"masks": masks}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        clip = ", ".join(f"{name}={x}" for name, x in CLIP.items())
        code = block.replace("151_936", str(VOCAB)).replace("normalizer=normalizer,", f"normalizer=normalizer, {clip},")
        exec(compile(code, "docs/megatron.md", "exec", dont_inherit=True), names)
        names.setdefault("forward_step of logits", names["forward_step"])
    return names


def old_logprobs_of(way: Way, model: Any, x: Responses, positions: Tensor, tp_group: Any) -> Tensor:
    if way.path == "logits":
        logits = model(x.tokens, positions, None)
        return token_logprobs(logits, x.labels, mask=x.mask, tp_group=tp_group, vocab_size=VOCAB).logprobs
    logprobs = partial(linear_token_logprobs, token_ids=x.labels, mask=x.mask, vocab_size=VOCAB)
    return loss_from_hidden(model, logprobs, x.tokens, positions, None).logprobs


def normalizer_of(way: Way, masks: list[Tensor], state: Any) -> Tensor | float:
    """As docs/megatron.md has it: shares of the responses' mean add up after what Megatron multiplies them by."""
    if way.scaled == "tokens":
        return 1.0
    group = state.get_data_parallel_group(with_context_parallel=True)
    count = partial(global_count, group=group, cp_group=state.get_context_parallel_group())
    if way.scaled == "responses":
        tokens = torch.stack([count(mask, aggregation="token_mean") for mask in masks]).sum()
        return torch.stack([count(mask) for mask in masks]).sum() / tokens
    return torch.stack([count(mask, averaged=True) for mask in masks]).sum() / len(masks)


def counted(way: Way, mask: Tensor) -> Tensor:
    """`num_tokens` of a micro-batch."""
    return torch.ones((), dtype=torch.int) if way.scaled == "by us" else mask.sum().int()


def wrapped(path: str, state: Any) -> Found:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.module import Float16Module

    gpt = built(Way(path=path), state, bf16=True)
    reduced = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(gpt.config, reduced, Float16Module(gpt.config, gpt))
    gpt.output_layer.gradient_accumulation_fusion = True  # its product would write main_grad itself, on a GPU
    x, positions, found = all_responses()[:2], torch.arange(LENGTH).expand(2, -1), dict[str, Any]()

    def loss(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        found.update({"same weight": weight is gpt.output_layer.weight, "dtype": hidden.dtype})
        found["shape"], found["logit_scale"] = tuple(hidden.shape), head["logit_scale"]
        return linear_gspo_loss(
            hidden, weight, x.labels, x.advantages.float(), mask=x.mask, vocab_size=VOCAB, **head
        ).loss

    model.zero_grad_buffer()
    loss_from_hidden(model, loss, x.tokens, positions, None).backward()
    main_grad = gpt.output_layer.weight.main_grad
    found["added in float32"] = main_grad.dtype is torch.float32 and bool(main_grad.any())
    found["rounded to bfloat16 before"] = torch.equal(main_grad, main_grad.bfloat16().float())
    found["no grad left"] = all(p.grad is None for p in gpt.parameters())

    gpt.config.use_mup, gpt.config.mup_output_mult = True, 0.25  # of Megatron-Core 0.18
    loss_from_hidden(model, loss, x.tokens, positions, None)
    for name in ("mtp_num_layers", "defer_embedding_wgrad_compute"):
        setattr(gpt.config, name, 1)
        found[name] = refused(partial(loss_from_hidden, model, loss, x.tokens, positions, None))
        setattr(gpt.config, name, None)
    found["no model"] = refused(partial(loss_from_hidden, torch.nn.Linear(2, 2), loss))
    refused(partial(loss_from_hidden, model, loss, x.tokens, positions, "no mask"))
    found["after an error"] = model(x.tokens, positions, None).shape == (2, LENGTH, padded_vocabulary(VOCAB, 2) // 2)

    decoder, gpt.decoder = gpt.decoder, Through()
    params = PackedSeqParams(qkv_format="thd")
    shape = loss_from_hidden(
        model, lambda hidden, *unused, **head: hidden.shape, x.tokens.reshape(1, -1), positions.reshape(1, -1), None,
        packed_seq_params=params,
    )  # fmt: skip
    found["packed"], gpt.decoder, gpt.post_process = tuple(shape), decoder, False
    found["another stage"] = tuple(loss_from_hidden(model, loss, x.tokens, positions, None).shape)
    return found
