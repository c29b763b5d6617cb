"""What is said of a published file that cannot be taken in."""


class ConversionError(ValueError):
    """A file that is missing, damaged, or not what the others say it is; the message names it and what to do."""
