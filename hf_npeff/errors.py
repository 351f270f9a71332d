"""The errors of the library, for cases that a caller may want to handle; wrong arguments raise a ValueError."""


class NPEFFError(Exception):
    """Base class of the errors that hf_npeff defines.

    Example:
        >>> try:
        ...     Decomposition.load("runs/none")
        ... except NPEFFError as error:
        ...     print(type(error).__name__)
        CorruptStoreError
    """


class IncompatibleSketchError(NPEFFError):
    """PEFs, a decomposition and a model do not fit together: their sketches, models or examples differ.

    Example:
        >>> rows = PEFs.from_factors(torch.randn(4, 2, 8))
        >>> decomposition.transform(rows)
        Traceback (most recent call last):
        hf_npeff.errors.IncompatibleSketchError: the decomposition with the sketch ...
    """


class IncompatibleWeightsError(IncompatibleSketchError):
    """The model's weights differ from those with which PEFs, a decomposition or a direction were made.

    Example:
        >>> pefs = analyzer.compute_pefs(dataset, "runs/before")
        >>> with direction.applied_to(model, scale=0.1):
        ...     pefs = analyzer.compute_pefs(dataset, "runs/before")
        Traceback (most recent call last):
        hf_npeff.errors.IncompatibleWeightsError: the PEFs in runs/before were made ...
    """


class UnsupportedModelError(NPEFFError):
    """The model, its head or one of its modules is not supported; the message says what to implement or to leave out.

    Example:
        >>> NPEFFAnalyzer(model.transformer)  # the layers without a head
        Traceback (most recent call last):
        hf_npeff.errors.UnsupportedModelError: GPT2Model has no output head that hf_npeff knows ...
    """


class CorruptStoreError(NPEFFError):
    """Files are missing, truncated or altered.

    Example:
        >>> pefs.save("runs/store")
        >>> Path("runs/store/manifest.json").unlink()
        >>> PEFs.load("runs/store")
        Traceback (most recent call last):
        hf_npeff.errors.CorruptStoreError: ...
    """


class FormatVersionError(NPEFFError):
    """Files were written by another version of the format; the message names both versions.

    Example:
        >>> FisherConfig.from_dict({"rank": 4})
        Traceback (most recent call last):
        hf_npeff.errors.FormatVersionError: a FisherConfig has the settings ...
    """
