"""The errors of the library. Plain misuse is a ValueError; these are for what a caller may want to tell apart."""


class NPEFFError(Exception):
    """Base of every error that is hf_npeff's own."""


class IncompatibleSketchError(NPEFFError):
    """PEFs, a decomposition or a model meet that were made with different sketches, models or examples."""


class UnsupportedModelError(NPEFFError):
    """The model, its head or one of its modules is not handled; the message says what to implement or to leave out."""


class CorruptStoreError(NPEFFError):
    """Files are missing, truncated or altered: what was read is not what was written."""


class FormatVersionError(NPEFFError):
    """Files were written by another version of the format; the message names both."""
