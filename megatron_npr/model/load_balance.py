"""The loss that keeps experts evenly loaded, over the global batch of an update.

    loss of a layer = E * sum over experts e of f_e * P_e          (Switch Transformer, arXiv 2101.03961, equations 4 to 6)

f_e is the share of all choices that fell on expert e, P_e the mean probability that the router gave it; 1 where the load is
even. Both are over the response tokens of all samples that the update computes: each stands exactly once, however rows are
packed, padded and shared out, while a prompt stands once or sixteen times. The global batch, as Qwen3's own training had it
(arXiv 2501.11873): balance within each sequence or micro-batch would keep experts from specialising.

f has no gradient, so a forward pass without gradients counts it over all micro-batches and ranks. P is a sum over tokens, so
that the micro-batches of the pass with gradients then add their parts independently.

Shape legend: S tokens of this rank's share of a row, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class ExpertLoad:
    """What the tokens of the global batch chose at one router.

    choices_E int64 [E]: how often each expert was chosen; probability_E float64 [E]: sum of its probabilities.
    """

    def __init__(self, num_experts: int, per_token: int, device: torch.device) -> None:
        self._per_token = per_token
        self.choices_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.probability_E = torch.zeros(num_experts, dtype=torch.float64, device=device)

    def add(self, choices_SE: Tensor, probabilities_SE: Tensor) -> None:
        """Counts tokens in; rows of zeros do not count."""
        self.choices_E += choices_SE.sum(0)
        self.probability_E += probabilities_SE.sum(0, dtype=torch.float64)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Sums the counts of all ranks that hold other tokens of the layer."""
        for counted in (self.choices_E, self.probability_E):
            dist.all_reduce(counted, group=group)

    def part(self, probabilities_SE: Tensor) -> Tensor:
        """What these tokens add to the layer's loss, with gradient; the parts of all tokens sum up to it."""
        return self._per_probability_E.to(probabilities_SE.dtype) @ probabilities_SE.sum(0)

    @property
    def loss(self) -> float:
        """The layer's loss over all counted tokens; 0 of none."""
        return float(self._per_probability_E @ self.probability_E)

    @property
    def _per_probability_E(self) -> Tensor:
        """E * f_e / tokens, float64 [E]: the loss's derivative by a probability."""
        choices = self.choices_E.sum().clamp(min=1).double()
        return self.choices_E * (len(self.choices_E) * self._per_token / choices**2)
