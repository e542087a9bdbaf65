"""The error for unusable questions: a kind, by which they are counted, and the full reason."""


class Unusable(ValueError):
    """A question, or its image or target, cannot be used; the message is one line.

    Attributes:
      kind: the problem without details, such as "a target box outside its picture".
      reason: the problem with numbers, names and the expected value; equals ``kind`` if there are no details.
    """

    def __init__(self, kind: str, reason: str = ""):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason or kind

    def __str__(self) -> str:
        return self.reason


def kind_of(error: BaseException, otherwise: str | None = None) -> str:
    """The kind of an error; if it has none, ``otherwise`` or the whole message."""
    return error.kind if isinstance(error, Unusable) else otherwise or str(error)
