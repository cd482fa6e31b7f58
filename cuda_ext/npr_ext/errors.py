"""The one exception type for mistakes of the user."""


class UserError(ValueError):
    """A mistake that the user can repair; its text names the value and the remedy (the CLI prints it and
    exits with 2)."""
