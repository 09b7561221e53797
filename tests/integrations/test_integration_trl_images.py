"""Vision-language models in GSPOTrainer: what TRL passes of a batch's images, and small models against TRL."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor
from trl_trainers import GRADIENT, LEVELS, LOSS, Build, OwnLogits, classes

from gspo_kernels.integrations.trl.images import NAMES

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the models' own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

IMAGE, VOCABULARY = 40, 48
NUM_IMAGES = [1, 0, 2, 2]
GRID = torch.tensor([[1, 4, 4], [1, 2, 4], [1, 4, 2], [1, 2, 2], [1, 2, 4]])  # patches, of which 4 are one token
ROWS = torch.arange(len(NUM_IMAGES) * 5).view(len(NUM_IMAGES), 5)

# What TRL passes of some processors: an entry per patch, tile, image or row.
PASSED: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL": {"pixel_values": torch.arange(44.0), "image_grid_thw": GRID, "mm_token_type_ids": ROWS},
    "Gemma 3": {"pixel_values": torch.arange(5.0), "token_type_ids": ROWS},
    "Gemma 4": {"pixel_values": torch.arange(5.0), "image_position_ids": torch.arange(5), "token_type_ids": ROWS},
    "LLaVA-NeXT": {"pixel_values": torch.arange(5.0), "image_sizes": torch.arange(10).view(5, 2)},
    "LFM2-VL": {
        "pixel_values": torch.arange(7.0), "pixel_attention_mask": torch.arange(7), "spatial_shapes": torch.arange(7),
        "num_tiles": [2, 0, 4, 1],
    },
    "InternVL": {"pixel_values": torch.arange(7.0), "num_tiles": [2, 0, 4, 1]},
    "text alone": {"num_images": None},
    "text of a mixed batch": {"num_images": [0, 0, 0, 0], "mm_token_type_ids": ROWS},
}  # fmt: skip
BY_ROW = {
    "pixel_values": torch.arange(4 * 3).view(4, 3),
    "pixel_attention_mask": torch.arange(4),
    "num_images": [1, 0, 2, 2],
}


@pytest.mark.parametrize("processor", [*PASSED, "SmolVLM"])
def test_what_the_model_is_passed(build: Build, processor: str) -> None:
    """As by TRL, for the whole batch and for parts of it."""
    from gspo_kernels.integrations.trl.images import of_rows

    images = BY_ROW if processor == "SmolVLM" else {"num_images": NUM_IMAGES, **PASSED[processor]}
    rows = len(NUM_IMAGES)
    ids = torch.arange(rows * 5).view(rows, 5) % VOCABULARY
    passed: list[dict[str, Any]] = []

    def model(labels: Any = None, **inputs: Any) -> Any:
        passed.append({n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)})
        shape = inputs["input_ids"].shape
        nothing = torch.zeros(shape[0], shape[1] - 1)
        return SimpleNamespace(log_probs=nothing, entropy=nothing, logits=torch.zeros(*shape, VOCABULARY))

    trainer = build(classes()[0], **LEVELS["sequence"], loss_type="grpo")
    for size in (rows, 1, 2, 3):
        passed.clear()
        trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 2, batch_size=size, **images)
        assert len(passed) == -(-rows // size)
        for start, expected in zip(range(0, rows, size), passed, strict=True):
            found = of_rows(images, slice(start, min(start + size, rows)))
            assert found.keys() == expected.keys() - {"input_ids", "attention_mask"}
            assert all(torch.equal(found[name], expected[name]) for name in found)


def test_unknown_arguments_are_refused(build: Build) -> None:
    """Of a later TRL, which passes images in another way."""
    ours = build(classes()[1])
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^pixel_scales: expected None, because this version of TRL"):
        ours._get_per_token_logps_and_entropies(ours.model, ids, ids, 2, pixel_scales=torch.zeros(1))


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4}  # fmt: skip


def qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}  # fmt: skip
    tokens = {"image_token_id": IMAGE, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    )


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    options = {"image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    vision = TOWER | {"model_type": "clip_vision_model"}
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=vision, **options)
    )


def gemma() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    options = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 42, "eoi_token_index": 43}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=TOWER, **options))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)  # is 0
    return model


def smolvlm() -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    options = {"image_token_id": IMAGE, "scale_factor": 1, "pad_token_id": 0}
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=TOWER, **options)
    )


def images_of(model: Any, types: Tensor) -> dict[str, Any]:
    """The arguments with images, as the model's processor makes them: pixels by patch, by image, or by row."""
    draw, kind = torch.Generator().manual_seed(3), model.config.model_type
    pixels = torch.randn(len(GRID), 3, 8, 8, generator=draw)
    if kind == "qwen2_5_vl":
        patches = torch.randn(int(GRID.prod(1).sum()), 3 * 2 * 4 * 4, generator=draw)
        return {"pixel_values": patches, "image_grid_thw": GRID, "mm_token_type_ids": types}
    if kind == "smolvlm":
        by_row = torch.zeros(len(NUM_IMAGES), max(NUM_IMAGES), 3, 8, 8)  # an image of zeros is no image
        for row, of_row in zip(by_row, pixels.split(NUM_IMAGES), strict=True):
            row[: len(of_row)] = of_row
        return {"pixel_values": by_row, "pixel_attention_mask": torch.ones(*by_row.shape[:2], 8, 8).long()}
    return {"pixel_values": pixels} | ({"token_type_ids": types} if kind == "gemma3" else {})


def batch_with_images(model: Any) -> dict[str, Any]:
    """Prompts padded on the left, with a token for each four patches; a row has no image, another has two."""
    draw = torch.Generator().manual_seed(1)
    counts = GRID.prod(1) // 4 if model.config.model_type == "qwen2_5_vl" else torch.full((len(GRID),), 4)
    tokens = counts.split(NUM_IMAGES)
    prompts = [[5, *(x for count in of_row.tolist() for x in (42, *[IMAGE] * count, 43)), 6] for of_row in tokens]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(x)) + x for x in prompts])
    completions = torch.randint(3, IMAGE, (len(prompts), 5), generator=draw)
    mask = torch.ones_like(completions)
    mask[1, 3:] = mask[3, 4:] = 0
    types = torch.cat([(ids == IMAGE).long(), torch.zeros_like(completions)], 1)
    return {
        "prompt_ids": ids, "prompt_mask": (ids != 0).long(), "completion_ids": completions, "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.8]), "num_sequences_in_batch": torch.tensor(8.0),
        "num_images": NUM_IMAGES, **images_of(model, types),
    }  # fmt: skip


@pytest.mark.parametrize("make", [qwen, llava, gemma, smolvlm])
def test_models_equal_trl(build: Build, make: Any) -> None:
    """Loss and gradients of both towers, old log-probabilities in parts of the batch; image tokens are prompt."""
    from gspo_kernels.integrations.trl.models import check_model

    torch.manual_seed(0)
    model = make().train()
    inputs = batch_with_images(model)
    check_model(model, torch.device("cpu"))
    trl, ours = (build(cls, **LEVELS["sequence"], loss_type="grpo") for cls in classes())
    own = OwnLogits(model, trl.temperature)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    images = {name: x for name, x in inputs.items() if name in NAMES}
    with torch.no_grad():
        expected, found, others = (
            t._get_per_token_logps_and_entropies(called, ids, attended, 5, batch_size=3, compute_entropy=True, **of)
            for t, called, of in (
                (trl, own, images),
                (ours, model, images),
                (ours, model, images | {"pixel_values": 2 * images["pixel_values"].flip(-1)}),
            )
        )
    torch.testing.assert_close(found[:2], expected[:2], rtol=5e-6, atol=5e-6)
    assert (found[0] - others[0]).abs().max() > 1e-4, "images matter"
    noise = 1e-3 * torch.randn(found[0].shape, generator=torch.Generator().manual_seed(2))
    inputs["old_per_token_logps"] = found[0] + noise
    losses, gradients = [], []
    for trainer, called in ((trl, own), (ours, model)):
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
        model.zero_grad()
        loss = trainer._compute_loss(called, dict(inputs))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], abs=LOSS)
    assert gradients[0].keys() == gradients[1].keys() and any("vis" in name for name in gradients[0])
    largest = max(g.abs().max() for g in gradients[0].values())
    assert largest > 1e-4
    assert max((gradients[1][n] - g).abs().max() for n, g in gradients[0].items()) < GRADIENT * largest
