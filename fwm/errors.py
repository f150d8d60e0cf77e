"""The one exception for what a user can cause: it becomes one sentence and exit status 2."""


class UserError(ValueError):
    """Wrong input from outside: says what was wrong, what was expected and what to do."""
