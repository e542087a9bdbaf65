"""What makes a question unusable: its kind, by which such questions are counted, and the whole reason, its own."""


class Unusable(ValueError):
    """A question, or what it is about, that cannot be used; one line.

    Attributes:
      kind: what is wrong, without what only this one has: "a target box outside its picture".
      reason: what is wrong, with numbers, names and what was expected; the kind where that says all.
    """

    def __init__(self, kind: str, reason: str = ""):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason or kind

    def __str__(self) -> str:
        return self.reason


def kind_of(error: BaseException, otherwise: str | None = None) -> str:
    """The kind of an error; of one that names none ``otherwise``, or all that it says."""
    return error.kind if isinstance(error, Unusable) else otherwise or str(error)
