"""The words that settings may be, and the defaults that several settings share."""

from __future__ import annotations

from typing import Any, Literal

OutputFactor = Literal["auto", "exact", "spectral", "projection", "sampling"]
SpectralMetric = Literal["auto", "hidden", "parameters"]
Positions = Literal["auto", "last", "labels", "all"]
SketchKind = Literal["auto", "kronecker", "countsketch", "two-stage", "identity"]
StorageDtype = Literal["float64", "float32", "float16", "bfloat16"]
Solver = Literal["block_power", "reference"]
Balance = Literal["none", "module"]
Precision = Literal["float32", "tf32", "bfloat16"]
OnError = Literal["raise", "skip"]
LiftMethod = Literal["exact", "adjoint", "compressed_sensing"]
LiftForm = Literal["auto", "plain", "metric"]
SparseSolver = Literal["iht", "fista"]
Ridge = float | Literal["auto"]
Quantisation = Literal["int8", "Q8_0", "Q4_0", "nf4"]
Towards = Literal["mean", "highest"]

BATCH_SIZE = 8
"""Examples of a forward pass. Chosen: a batch of prompts of a 7B model fits beside its weights on one GPU, and smaller
models gain little by more; the numbers do not depend on it beyond rounding."""

SHADED = 12
"""Top examples of a component whose tokens are shaded. Chosen: as many as a person reads on the page."""

INTERVAL = (0.025, 0.975)
"""Quantiles between which a bootstrap interval lies: 95%, as is usual."""

GRAM_LIMIT = 8000
"""Rows n·c up to which a fit writes them in Gram space. Chosen: their Gram matrix has 0.5 GB there, in float64."""

NO_OPTION: dict[str, Any] = {"option": False}
"""Metadata of a field without an option on the command line, where it is set in another way."""
