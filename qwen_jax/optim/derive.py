# SPDX-License-Identifier: Apache-2.0
"""Tokens -> batch -> steps -> learning rate -> warm-up -> decay, reasons in the open.

Whatever a run leaves open is derived from what it gives, in numbered steps, each with
its rule and source; the lines are printed when a run starts. A given number is never
changed, only repeated in the list.

Sources:
  tokens     20 a weight: Hoffmann et al., "Chinchilla" (arXiv 2203.15556)
  batch, lr  B = 0.58 D^0.571 tokens, lr = 1.79 N^-0.713 D^0.307: Li et al., "Step Law"
             (arXiv 2503.04715); N weights without vocabulary, D tokens
  lr, batch  lr ~ sqrt(batch) away from that B: Malladi et al. (arXiv 2205.10287)
  warm-up    2 / (1 - b2) steps: Ma and Yarats (arXiv 1910.04209)
  wsd decay  the last fifth: Hägele et al. (arXiv 2405.18392)
  Muon       the same lr, its updates having AdamW's RMS: Liu et al. (arXiv 2502.16982)
  averaging  1 / (lr weight_decay) steps: Wang and Aitchison (arXiv 2405.13698)
Deviations: a warm-up is at most a tenth of the run, or short runs would never reach
their peak; Step Law was fitted on about 60M to 1B weights and 2B to 100B tokens:
outside of that the printed line says extrapolated, and the rate never passes 2^-7, the
largest of the law's own search.

Units: tokens are target tokens; batch_tokens is the global batch of one update.
Invariants: batch_tokens is a multiple of round_to; num_steps is at least 1; the optim
record that comes back has nothing left open.
Raises: config.InputError for sizes that cannot be (batch larger than all tokens).
"""

import dataclasses
import math

from qwen_jax import config
from qwen_jax.optim import build, schedules

TOKENS_PER_WEIGHT = 20
FITTED_WEIGHTS = (59e6, 1.1e9)
FITTED_TOKENS = (2e9, 100e9)
LARGEST_LR = 2.0**-7


@dataclasses.dataclass(frozen=True)
class Derivation:
    """The numbers of a run and, line by line, where each comes from."""

    tokens: int
    batch_tokens: int
    num_steps: int
    optim: build.OptimConfig
    lines: tuple[str, ...]


def derive(
    optim: build.OptimConfig,
    *,
    num_weights: int,
    tokens: int = 0,
    batch_tokens: int = 0,
    round_to: int = 1,
) -> Derivation:
    """Fill in what a run leaves open.

    Args:
      optim: its lr_peak (0), warmup_steps and decay_steps (-1) may be open.
      num_weights: weights without embedding and head, Step Law's N.
      tokens: target tokens of the whole run, 0 = derive.
      batch_tokens: tokens of one update over all devices, 0 = derive.
      round_to: smallest batch the mesh can take (rows times devices, in tokens).
    """
    if num_weights < 1 or tokens < 0 or batch_tokens < 0 or round_to < 1:
        raise config.InputError(
            f"num_weights={num_weights}, tokens={tokens}, batch_tokens={batch_tokens}, "
            f"round_to={round_to}: wanted positive numbers (0 leaves tokens or "
            "batch_tokens open)"
        )
    says = []
    if tokens:
        says.append(f"tokens = {tokens:,}: given")
    else:
        tokens = TOKENS_PER_WEIGHT * num_weights
        says.append(
            f"tokens = {TOKENS_PER_WEIGHT} x {num_weights:,} weights = {tokens:,} "
            "(Chinchilla, arXiv 2203.15556)"
        )
    best = 0.58 * tokens**0.571
    if batch_tokens:
        says.append(
            f"batch = {batch_tokens:,} tokens: given (Step Law would take {best:,.0f})"
        )
    else:
        batch_tokens = max(round(best / round_to), 1) * round_to
        says.append(
            f"batch = 0.58 tokens^0.571 = {best:,.0f}, in units of {round_to:,}: "
            f"{batch_tokens:,} tokens (Step Law, arXiv 2503.04715)"
        )
    num_steps = tokens // batch_tokens
    if num_steps < 1:
        raise config.InputError(
            f"tokens={tokens:,} is less than one batch of {batch_tokens:,} tokens: "
            "lower the batch or give more tokens"
        )
    says.append(f"steps = tokens / batch = {num_steps:,}")
    optim = _rates(optim, num_weights, tokens, batch_tokens, best, says)
    optim = _lengths(optim, num_steps, says)
    lines = tuple(f"{i}. {line}" for i, line in enumerate(says, 1))
    return Derivation(tokens, batch_tokens, num_steps, optim, lines)


def _rates(
    optim: build.OptimConfig,
    num_weights: int,
    tokens: int,
    batch_tokens: int,
    best: float,
    says: list[str],
) -> build.OptimConfig:
    """lr_peak filled in; says what the weight decay means at that rate."""
    if optim.lr_peak:
        says.append(f"lr_peak = {optim.lr_peak:g}: given")
    else:
        law = 1.79 * num_weights**-0.713 * tokens**0.307
        scale = math.sqrt(batch_tokens / best)
        rate = float(f"{min(law * scale, LARGEST_LR):.3g}")
        optim = dataclasses.replace(optim, lr_peak=rate)
        fitted = (
            FITTED_WEIGHTS[0] <= num_weights <= FITTED_WEIGHTS[1]
            and FITTED_TOKENS[0] <= tokens <= FITTED_TOKENS[1]
        )
        says.append(
            f"lr_peak = 1.79 weights^-0.713 tokens^0.307 = {law:.3g} (Step Law"
            f"{'' if fitted else ', extrapolated'}) x sqrt(batch / {best:,.0f}) = "
            f"{scale:.3g} (arXiv 2205.10287), at most {LARGEST_LR:.3g}: {rate:g}"
        )
    if optim.name == "muon":
        says.append(
            f"Muon takes the same lr: its updates are scaled to an RMS of "
            f"{optim.muon_rms:g} (arXiv 2502.16982)"
        )
    return optim


def _lengths(
    optim: build.OptimConfig, num_steps: int, says: list[str]
) -> build.OptimConfig:
    """Warm-up and decay filled in."""
    if optim.warmup_steps >= 0:
        says.append(f"warm-up = {optim.warmup_steps:,} steps: given")
    else:
        untuned = round(2 / (1 - optim.b2))
        room = num_steps - max(optim.decay_steps, 0)
        warmup = max(min(untuned, num_steps // 10, room), 0)
        optim = dataclasses.replace(optim, warmup_steps=warmup)
        says.append(
            f"warm-up = 2 / (1 - b2) = {untuned:,} steps (arXiv 1910.04209), at most a "
            f"tenth of the run: {warmup:,}"
        )
    given = optim.decay_steps >= 0
    _, start, decay = schedules.phases(optim, num_steps)
    optim = dataclasses.replace(optim, decay_steps=decay)
    rule = "all after warm-up"
    if optim.schedule == "wsd":
        rule = f"last {schedules.WSD_SHARE:.0%} (arXiv 2405.18392)"
    says.append(
        f"decay = {optim.schedule} over {decay:,} steps from step {start:,} to "
        f"{optim.lr_end_ratio:g} of the peak: {'given' if given else rule}"
    )
    if optim.weight_decay:
        window = 1 / (optim.lr_peak * optim.weight_decay)
        says.append(
            f"weight decay = {optim.weight_decay:g}: given; weights average the last "
            f"1 / (lr x decay) = {window:,.0f} updates (arXiv 2405.13698), "
            f"{window / num_steps:.2g} of the run"
        )
    return optim
