"""WeightsIdentity: identifies the weights with which results were made, and compares identities.

A name and a commit say where weights came from. They do not say whether the weights were trained, merged or edited
later. Rows of two sets of weights in one store, or cotangents sent back with other weights, would give numbers that
look right but are wrong. `hf_npeff.fisher.weights_hash` computes a model's identity. In files it is JSON, the result of
`to_dict`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hf_npeff.errors import IncompatibleWeightsError

logger = logging.getLogger(__name__)
SEVERAL = "PEFs of models with different weights were joined"
"""Why joined PEFs have no hash."""


@dataclass(frozen=True)
class WeightsIdentity:
    """The identity of a model's weights.

    A copy in another dtype (bfloat16 of float32) has other weights, because its predictions and gradients differ.
    Weights on another device, offloaded or sharded by FSDP2 have the same identity, and a disabled adapter does not
    change it.

    Attributes:
        hash: a hash of the weights and persistent buffers of the bare model, with their names, shapes and dtypes; None
            if they cannot be read.
        adapters: {name: hash of its weights and scalings} of the active PEFT adapters. A merged adapter is part of
            `hash`; a disabled one is not included.
        quantization: the quantisation method, for instance "bitsandbytes", or None.
        unknown: why there is no hash.
    """

    hash: str | None
    adapters: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None
    unknown: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "hash": self.hash,
            "adapters": dict(self.adapters),
            "quantization": self.quantization,
            **({} if self.unknown is None else {"unknown": self.unknown}),
        }


def difference(made: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str | None:
    """How two identities, as JSON holds them, differ, in words; None where they are equal or one is not known."""
    if not is_known(made) or not is_known(now):
        return None
    assert made is not None and now is not None
    if made["quantization"] != now["quantization"]:
        return f"quantised by {made['quantization'] or 'nothing'} then, by {now['quantization'] or 'nothing'} now"
    if made["hash"] != now["hash"]:
        return f"their hash was {made['hash'][:8]}… and is now {now['hash'][:8]}…"
    # A name is what somebody called an adapter; what it does is in its hash.
    if sorted(made["adapters"].values()) != sorted(now["adapters"].values()):
        return f"{_in_words(made['adapters'])} then, {_in_words(now['adapters'])} now"
    return None


def joined(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The identity of PEFs that are joined, with a warning where they are of different weights.

    Where some of the weights are known to be unknown, so are those of all. Parts of older versions, which say nothing,
    are passed over.
    """
    given = [part for part in parts if part is not None]
    known = [part for part in given if is_known(part)]
    if how := next(filter(None, (difference(known[0], other) for other in known[1:])), None):
        logger.warning("PEFs of models with different weights are joined (%s); they cannot be lifted", how)
        return WeightsIdentity(None, unknown=SEVERAL).to_dict()
    unknown = sorted((part for part in given if not is_known(part)), key=lambda part: part.get("unknown") != SEVERAL)
    return next((dict(part) for part in (*unknown, *known)), None)


def shown(identity: Mapping[str, Any] | None) -> str | None:
    """An identity, as JSON holds it, in a line for people; None where it is not known."""
    if identity is None or not is_known(identity):
        return None
    adapters = f", with {_in_words(identity['adapters'])}" if identity["adapters"] else ""
    return f"{identity['hash']}{adapters}"


def is_known(identity: Mapping[str, Any] | None) -> bool:
    """Whether an identity, as JSON holds it, can be compared with another."""
    return identity is not None and identity.get("hash") is not None


def check_same_weights(made: Mapping[str, Any] | None, now: Mapping[str, Any] | None, what: str, remedy: str) -> None:
    """Check that an object was made with the weights that the model has now.

    Args:
        made: the identity stored with the object; None if an older version wrote it.
        now: the model's identity.
        what: the object, as the start of a sentence: "the PEFs in runs/pefs".
        remedy: what to do, in a sentence.

    Raises:
        IncompatibleWeightsError: if they differ.
    """
    if made is None:
        _say_once(what)
    elif made.get("unknown") == SEVERAL:
        raise IncompatibleWeightsError(
            f"{what} are of models with different weights, joined by PEFs.concatenate. {remedy} check_weights=False "
            "skips this check."
        )
    elif how := difference(made, now):
        raise IncompatibleWeightsError(
            f"{what} were made with other weights than the model has now ({how}). {remedy} check_weights=False skips "
            "this check."
        )


def warn_of_other_weights(made: Mapping[str, Any] | None, now: Mapping[str, Any] | None, what: str) -> None:
    """Warn where two identities differ.

    Args:
        made: the identity of the first weights.
        now: the identity of the second.
        what: is the matter, in a clause.
    """
    if how := difference(made, now):
        logger.warning("%s (%s), so their numbers may not be comparable", what, how)


def warn_of_other_predictions(made: object, now: object, what: str) -> None:
    """Warn where a model predicted something else for the same random texts, as `pilot_predictions` keeps it.

    Args:
        made: what was predicted for the first.
        now: for the second.
        what: is the matter, in a clause.
    """
    if (first := _pilots(made)) is None or (second := _pilots(now)) is None or len(first[0]) != len(second[0]):
        return
    apart = max((abs(a - b) for a, b in zip(first[0], second[0], strict=True)), default=0.0)
    if apart > first[1] + second[1]:
        logger.warning(
            "%s (log-probabilities of random texts differ by %.2g): the same weights under another config, another "
            "module, or a hook that steers; so their numbers may not be comparable",
            what,
            apart,
        )


def _pilots(value: object) -> tuple[list[float], float] | None:
    """The values and the tolerance of pilot predictions; None of anything else, since nobody knows who wrote a file."""
    if not isinstance(value, dict) or not isinstance(value.get("values"), list):
        return None
    numbers = [*value["values"], value.get("tolerance")]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return None
    return [float(number) for number in value["values"]], float(value["tolerance"])


@lru_cache(maxsize=64)  # chosen: the stores of a session
def _say_once(what: str) -> None:
    logger.warning("%s do not say with which weights they were made, so this is not checked", what)


def check_identity(value: object) -> None:
    """Refuse an identity that is not as `WeightsIdentity.to_dict` writes it; None is what older versions wrote.

    Raises:
        TypeError: if it is not.
    """
    if value is None:
        return
    if not isinstance(value, dict) or not isinstance(value.get("adapters"), dict):
        raise TypeError(f"weights: {value!r:.200}")
    texts = [value.get("hash"), value.get("quantization"), value.get("unknown")]
    named = [*value["adapters"], *value["adapters"].values()]
    if not all(isinstance(text, str | None) for text in texts) or not all(isinstance(text, str) for text in named):
        raise TypeError(f"weights: {value!r:.200}")


def _in_words(adapters: Mapping[str, str]) -> str:
    return ", ".join(f"adapter {name!r} ({kept[:8]}…)" for name, kept in sorted(adapters.items())) or "no adapter"
