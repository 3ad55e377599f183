"""How far two models' next-token distributions are apart along an answer. Arithmetic only.

The figures are those of llama.cpp's --kl-divergence: divergence, same top token, change of the right token's probability.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenComparison:
    """Two models at the tokens of one answer; every field has one entry per token."""

    divergence: Tensor
    """float64: KL(reference || quantized) in nats."""
    same_top: Tensor
    """bool: both find the same token likeliest."""
    probability_change: Tensor
    """float64: of the token that follows, quantized minus reference."""
    reference_surprise: Tensor
    """float64: -log p of the token that follows, in the reference."""
    quantized_surprise: Tensor

    @property
    def finite(self) -> Tensor:
        """bool: where there is a distance; a model whose numbers overflowed has none."""
        return torch.isfinite(self.divergence) & torch.isfinite(self.quantized_surprise)


@dataclass(frozen=True)
class DistributionSummary:
    """What a bundle's distributions lost, over all tokens of all answers."""

    tokens: int
    mean_divergence: float
    median_divergence: float
    high_divergence: float
    """99 of 100 tokens are below."""
    largest_divergence: float
    top_agreement: float
    """Share of tokens at which both find the same token likeliest."""
    mean_probability_change: float
    """Of the token that follows: negative where the bundle is less sure of it."""
    probability_change_spread: float
    """Root mean square of the same."""
    surprise_ratio: float | None
    """Perplexity of the answers for the bundle over that for the reference."""


def compare_logits(wanted: Tensor, given: Tensor, ids: Sequence[int]) -> TokenComparison:
    """Compare logits [tokens, vocab] of reference and bundle where the answer's `ids` follow."""
    wanted, given = torch.log_softmax(wanted.double(), -1), torch.log_softmax(given.double(), -1)
    following = torch.tensor(ids, device=wanted.device)[:, None]
    right, found = wanted.gather(1, following)[:, 0], given.gather(1, following)[:, 0]
    # A token that the reference thinks impossible adds nothing, whatever the bundle thinks.
    terms = torch.where(wanted == -torch.inf, 0.0, wanted.exp() * (wanted - given))
    return TokenComparison(
        divergence=terms.sum(-1).clamp(min=0),
        same_top=wanted.argmax(-1) == given.argmax(-1),
        probability_change=found.exp() - right.exp(),
        reference_surprise=-right,
        quantized_surprise=-found,
    )


def summarize_tokens(comparisons: Iterable[TokenComparison]) -> DistributionSummary | None:
    """One summary of many answers, every token alike that has a finite distance; None if there are none."""
    comparisons = list(comparisons)
    if not any(bool(each.finite.any()) for each in comparisons):
        return None
    divergence, same, change, before, after = (
        torch.cat([getattr(each, name)[each.finite] for each in comparisons]) for name in TokenComparison.__dataclass_fields__
    )
    ratio = float((after.mean() - before.mean()).exp())
    return DistributionSummary(
        tokens=len(divergence),
        mean_divergence=float(divergence.mean()),
        median_divergence=float(divergence.median()),
        high_divergence=float(divergence.kthvalue(max(1, len(divergence) * 99 // 100)).values),
        largest_divergence=float(divergence.max()),
        top_agreement=float(same.double().mean()),
        mean_probability_change=float(change.mean()),
        probability_change_spread=float(change.square().mean().sqrt()),
        surprise_ratio=ratio if ratio < float("inf") else None,
    )
