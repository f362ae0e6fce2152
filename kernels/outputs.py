"""What is said of rows of logits beside them: the definitions, in plain PyTorch, which are the oracle of csrc/outputs.h
and serve where `decoder.Decoder` does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Of a row: its likeliest token, of several the first; its logit, NaN if any is; and, where asked for, of the softmax
# the entropy in nats, the largest probability, and that less the second largest.
FIELDS = ("token", "largest", "entropy", "top1", "margin")


class Outputs(NamedTuple):
    """Of R sampled rows over a vocabulary of V."""

    logits: Tensor  # float32 [R, V]
    summary: Tensor  # float64 [R, FIELDS]
    seconds: tuple[float, float] | None = None  # that attention and products with weights took, where measured


def summarize(logits: Tensor, with_statistics: Tensor | None) -> Tensor:
    """`logits` float32 [R, V] and bool [R], whose statistics are wanted, to float64 [R, FIELDS]; what is not is 0."""
    largest, tokens = logits.max(dim=-1)
    summary = torch.zeros(len(logits), len(FIELDS), dtype=torch.float64, device=logits.device)
    summary[:, 0], summary[:, 1] = tokens, largest
    if with_statistics is not None:
        logarithms = logits[with_statistics].double().log_softmax(dim=-1)
        p = logarithms.exp()
        top1 = p.amax(dim=-1)
        second = p.scatter(1, tokens[with_statistics, None], 0).amax(dim=-1)
        entropy = -(p * logarithms.clamp(min=-1e300)).sum(dim=-1)  # 0 where p is, also of logits that are -inf
        summary[with_statistics, 2:] = torch.stack((entropy, top1, top1 - second), dim=-1)
    return summary
