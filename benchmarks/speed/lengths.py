# SPDX-License-Identifier: Apache-2.0
"""How long the benchmarks' sequences are."""

import math

import torch

# Of 8 rows of 128 tokens, half of them padding.
HALF_PADDING = [128, 112, 80, 64, 48, 32, 32, 16]


def c4_lengths(count: int, seqlen: int, seed: int = 0) -> list[int]:
    """Stand-in for C4, of which only the mean is published, 427 tokens a document: log-normal with
    that mean and sigma 1, plus [CLS] and [SEP], cut at `seqlen`."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # The mean of exp(N(m, 1)) is exp(m + 1/2).
    lengths = (math.log(427) - 0.5 + normal).exp().long() + 2
    return lengths.clamp(max=seqlen).tolist()
