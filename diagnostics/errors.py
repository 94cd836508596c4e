"""Errors that a user can act on."""


class UsageError(ValueError):
    """Something was asked for that does not exist or cannot be done; the message names the remedy. Exit code 2."""
