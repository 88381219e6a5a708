"""What hesscope says when it cannot go on, and what it says when it can but the caller should know."""


class HesscopeError(ValueError):
    """Bad input or an impossible request; its text says what was expected, what came and what to do."""


class HesscopeWarning(UserWarning):
    """The answer stands, but something about it is probably not what the caller had in mind."""
