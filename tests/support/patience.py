"""How long a test waits for what may hang: the only clock in the tests, and one that a busy machine does not reach."""

SECONDS = 1500.0
"""Less than pytest gives a test (`timeout` in pyproject.toml), so that what hangs shows what it said."""
