"""The ids of the eight tags."""

from dataclasses import astuple, dataclass

from npr_ext.errors import UserError


@dataclass(frozen=True)
class TagIds:
    """Token ids of the eight tags; each tag is one token."""

    guideline: int
    guideline_end: int
    plan: int
    plan_end: int
    step: int
    step_end: int
    takeaway: int
    takeaway_end: int

    def __post_init__(self) -> None:
        ids = self.as_tuple()
        if len(set(ids)) != len(ids) or min(ids) < 0:
            raise UserError(
                f"tag ids must be eight different token ids, not {ids}: add the tags to the tokenizer"
            )

    def as_tuple(self) -> tuple[int, ...]:
        """The ids in the order of the fields."""
        return astuple(self)
