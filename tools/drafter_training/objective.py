"""Cross-entropy to the target's distribution without scoring the whole vocabulary.

The target's distribution is known as its K likeliest tokens and a rest. The drafter scores those K,
the columns of the most frequent tokens, and a fresh sample of the others that stands for all of
them: each sampled logit is raised by log(others / sampled), which makes the sum of exponentials an
unbiased estimate (sampled softmax). With all tokens among the frequent ones it is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Columns:
    """The tokens scored in a step. head: [vocabulary, d], frozen."""

    def __init__(self, head: Tensor, counts: Tensor, frequent: int, sampled: int):
        vocab = len(head)
        frequent = min(frequent, vocab)
        order = counts.argsort(descending=True, stable=True)
        self.head = head
        self.frequent = order[:frequent].to(head.device)
        self.others = order[frequent:].to(head.device)
        self.frequent_rows = head[self.frequent]
        self.sampled = min(sampled, len(self.others))
        self._column_of = torch.full((vocab,), -1, device=head.device)
        self._column_of[self.frequent] = torch.arange(frequent, device=head.device)
        self._sample = self.others[:0]

    def draw(self, generator: torch.Generator) -> None:
        """A new sample of the tokens that are not frequent."""
        if self.sampled == 0:
            return
        self._column_of[self._sample] = -1
        chosen = torch.randperm(len(self.others), generator=generator)[: self.sampled]
        self._sample = self.others[chosen.to(self.others.device)]
        places = torch.arange(self.sampled, device=self.head.device) + len(self.frequent)
        self._column_of[self._sample] = places

    def cross_entropy(
        self, hidden: Tensor, ids: Tensor, probs: Tensor, frequent_rows: Tensor | None = None
    ) -> Tensor:
        """Mean over rows of -sum(p log q). hidden [n, d]; ids, probs [n, K] of the target.

        frequent_rows [frequent, d]: a trained head's rows in place of the frozen one's.
        """
        rows = self.frequent_rows if frequent_rows is None else frequent_rows
        logits = torch.cat([hidden @ rows.T, hidden @ self.head[self._sample].T], 1).float()
        column = self._column_of[ids]
        scored = column >= 0
        own = torch.einsum("nkd,nd->nk", self.head[ids], hidden.to(self.head.dtype)).float()
        best = torch.where(scored, logits.gather(1, column.clamp(min=0)), own)

        # The K tokens count on their own: they leave the columns that stand for the rest.
        hit = torch.zeros_like(logits).scatter_add_(1, column.clamp(min=0), scored.float())
        rest = logits.masked_fill(hit > 0, -math.inf)
        if self.sampled:
            raised = math.log(len(self.others) / self.sampled)
            rest = torch.cat(
                [rest[:, : len(self.frequent)], rest[:, len(self.frequent) :] + raised], 1
            )
        rest = rest.logsumexp(1)
        total = torch.logaddexp(best.logsumexp(1), rest)
        missing = (1 - probs.sum(1)).clamp(min=0)
        loss = -(probs * (best - total[:, None])).sum(1) - missing * (rest - total)
        return loss.mean()
