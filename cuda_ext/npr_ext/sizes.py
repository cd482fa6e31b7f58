"""Sizes that an operator's caller and its GPU form share."""

RUN_TOKENS = 16
"""Neighbouring tokens of one batch row (a prefill chunk) that a GPU computes together in paged attention, at most."""
