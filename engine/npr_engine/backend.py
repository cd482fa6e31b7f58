"""What whoever needs rollouts asks of an engine: the whole interface between training and decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from npr_engine.language.token_ids import TokenIds
from npr_engine.model.linear import Weight
from npr_engine.rollout import Rollout
from npr_engine.sampling import SamplingParams


class Backend(Protocol):
    """Decodes prompts with weights that its caller renews; see Engine for what each member promises."""

    def generate(
        self,
        prompts: Sequence[TokenIds],
        sampling: SamplingParams | Sequence[SamplingParams],
        request_ids: Sequence[str] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Rollout]:
        """A rollout for each prompt, in their order."""

    def update_weights(self, weights: Mapping[str, Weight], version: int) -> None:
        """Takes the weights over; all KV is void, rollouts carry the version."""

    def release_memory(self) -> None:
        """Gives the memory of the KV cache back until `resume_memory`."""

    def resume_memory(self) -> None:
        """Takes it again."""
