"""Run by kernel-builder, which builds the kernel first: nix run .#ci-test."""

import kernels
import pytest
import torch

gspo_kernels = kernels.get_kernel("gspo-kernels/gspo-kernels", version=0)


@pytest.mark.kernels_ci
def test_loss_and_gradient_of_plain_torch() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 1_000, device=device, requires_grad=True)
    token_ids = torch.randint(1_000, (4, 6), device=device)
    advantages = torch.tensor([1.0, -0.5, 0.25, -1.0], device=device)
    reference = logits.detach().double().requires_grad_()
    logprobs = reference.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    old = logprobs.detach() + 0.01 * torch.randn(4, 6, dtype=torch.float64, device=device)
    ratio = (logprobs - old).mean(-1).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.99, 1.01) * advantages).mean()
    expected.backward()

    loss, _ = gspo_kernels.gspo_loss(logits, token_ids, advantages, old.float(), eps_low=0.01, eps_high=0.01)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=1e-4, atol=1e-7)
