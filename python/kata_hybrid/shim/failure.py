"""The one error of the short actions; ``kata_hybrid.errors`` costs an import of ``typing``."""


class ShimError(Exception):
    """An action failed. The text goes to standard error and becomes the client's error."""
