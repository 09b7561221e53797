"""The clip range of a training: constant, or fitted to its recent updates after each rollout (`--clip-share`)."""

from __future__ import annotations

import argparse
import warnings
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gspo_kernels import GRPO, GSPO, ClipRange, GSPOToken, Objective, Stats, suggest_clip_range

RECENT = 64  # updates that a range is fitted to
SHARE = 0.15  # of the responses that the range suggested at the end would clip, if no share was asked for
FITTED = (GSPO, GSPOToken, GRPO)  # PPO is a GRPO


@dataclass
class Fit:
    """What the record has of the clip range at the end."""

    eps_low: float  # of the last rollout
    eps_high: float
    updates: int  # the recent ones, to which all below belongs
    clipped: float  # share of their responses with an advantage that were clipped, or had a clipped token
    share: float  # and the range that would clip this share on each side
    suggested_low: float
    suggested_high: float
    noise_low: float | None  # share that the engine's noise alone would clip there
    noise_high: float | None

    def lines(self) -> str:
        noise = ""
        if self.noise_low is not None and self.noise_high is not None:
            noise = f" (the engine's noise alone: {self.noise_low:.1%} below, {self.noise_high:.1%} above)"
        return (
            f"Clip range at the end: eps_low {self.eps_low:.2g}, eps_high {self.eps_high:.2g}\n"
            f"Clipped {self.clipped:.0%} of the responses of the last {self.updates} updates; for {self.share:.0%} on "
            f"each side: "
            f"eps_low {self.suggested_low:.2g}, eps_high {self.suggested_high:.2g}{noise}"
        )


@dataclass(frozen=True)
class _Update:
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    clipped: Tensor  # how many responses were clipped
    rewarded: Tensor  # of those with an advantage


class Clipping:
    """The objective of a training, and what its clip range rests on."""

    def __init__(self, objective: Objective, share: float | None = None) -> None:
        self.objective, self.share = objective, share
        self.fits = isinstance(objective, FITTED)
        self._recent: deque[_Update] = deque(maxlen=RECENT)
        self._told: set[str] = set()  # which warnings

    @property
    def bounds(self) -> list[float]:
        return [self.objective.eps_low, self.objective.eps_high]  # type: ignore[attr-defined]

    def see(self, stats: Stats, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """An update. Packed batches are those of GSPO, which has one ratio for each response."""
        if not self.fits:
            return
        clipped = stats.clipped_low | stats.clipped_high
        rewarded = advantages != 0 if advantages.ndim == 1 else ((advantages != 0) & mask.bool()).any(1)
        clipped = clipped if clipped.ndim == 1 else clipped.any(1)
        update = _Update(stats.log_ratio, advantages, mask, cu_seqlens, clipped.sum(), rewarded.sum())
        self._recent.append(update)

    def adapt(self, noise: Tensor | None = None) -> None:
        """After a rollout's updates: the range for the next one, if a share was asked for."""
        if self.share is not None:
            found = self._suggest(self.share, noise)
            bounds: dict[str, Any] = {"eps_low": found.eps_low, "eps_high": found.eps_high}
            self.objective = replace(self.objective, **bounds)  # type: ignore[type-var]

    def fit(self, last: Objective, noise: Tensor | None = None) -> Fit:
        """`last`: the objective of the last rollout."""
        share = self.share or SHARE
        found = self._suggest(share, noise)
        clipped, rewarded = (
            sum(getattr(each, name).item() for each in self._recent) for name in ("clipped", "rewarded")
        )
        return Fit(
            last.eps_low, last.eps_high, len(self._recent), clipped / max(1, rewarded), share, found.eps_low,
            found.eps_high, found.noise_low, found.noise_high,
        )  # fmt: skip

    def _suggest(self, share: float, noise: Tensor | None) -> ClipRange:
        """Each kind of warning is shown once, and only if the training uses the range."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = suggest_clip_range(
                [each.log_ratio for each in self._recent],
                [each.advantages for each in self._recent],
                share,
                mask=[each.mask for each in self._recent],
                cu_seqlens=[each.cu_seqlens for each in self._recent],
                current=self.objective,
                noise=noise,
            )
        for each in caught:
            text = str(each.message)
            if self.share is not None and (name := text.split(":")[0]) not in self._told:
                self._told.add(name)
                warnings.warn(text, stacklevel=3)
        return found


def fraction(text: str) -> float:
    """The type of an option that is a share."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, such as {SHARE:g}, got {text}")
    return value


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip-share",
        type=fraction,
        metavar="SHARE",
        help=f"after each rollout, fit the clip range to the last {RECENT} updates so that this share of the responses "
        "on each side would be clipped (default: the range is constant)",
    )


def check_option(parser: argparse.ArgumentParser, share: float | None, loss: str, objective: Objective) -> None:
    if share is not None and not isinstance(objective, FITTED):
        parser.error(
            "--clip-share: only for gspo, gspo_token, grpo and ppo, which clip a ratio on the side that its advantage "
            f"penalizes; got {loss}"
        )
