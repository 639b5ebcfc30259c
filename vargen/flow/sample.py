"""What every sampler of continuous tokens returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadSample:
    """Continuous tokens, with what continuous speculative decoding (arXiv 2411.11925) needs of the steps that made them.

    Attributes:
        tokens: the result, ``(..., C)``.
        mean: mean of the last step's Gaussian. Samplers add no noise in their last step, so it is the result.
        std: standard deviation that the last step's noise would have had, times the temperature; 0 for deterministic samplers.
        log_std_sum: sum over all earlier steps of the log standard deviation without temperature; 0 for deterministic samplers.
    """

    tokens: Tensor
    mean: Tensor
    std: Tensor
    log_std_sum: Tensor

    @classmethod
    def deterministic(cls, tokens: Tensor) -> HeadSample:
        """The result of a sampler that adds no noise."""
        zero = tokens.new_zeros(()).expand_as(tokens)
        return cls(tokens, tokens, zero, zero)
