"""What hesscope says when it cannot go on, and what it says when it can but the caller should know."""


class HesscopeError(ValueError):
    """Bad input or an impossible request; its text says what was expected, what came and what to do."""


class RankLost(HesscopeError):
    """Processes that worked together are no longer in step: one has failed or is gone, so that all have to start again."""


class HesscopeWarning(UserWarning):
    """The answer stands, but something about it is probably not what the caller had in mind."""


class UnusedParameters(HesscopeWarning):
    """No batch's loss depends on some of the selected parameters, in `names`."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        listed = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        super().__init__(f"The loss does not depend on {listed}: rows and columns there are zero.")
