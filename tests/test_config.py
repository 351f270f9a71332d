"""Settings: checked when they are made, the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hf_npeff import DecompositionConfig, FisherConfig, FormatVersionError


@pytest.mark.parametrize(
    "config",
    [
        FisherConfig(),
        FisherConfig(
            rank=2,
            output_factor="sampling",
            positions="labels",
            target_modules=["q_proj", "v_proj"],
            exclude_modules="lm_head",
            parameters=("bias",),
            sketch="two-stage",
            sketch_dim=64,
            sketch_tolerance=0.3,
            seed=7,
            storage_dtype="bfloat16",
        ),
        DecompositionConfig(),
        DecompositionConfig(n_components=3, solver="reference", balance="module", memory_budget=10, tolerance=0),
    ],
)
def test_a_config_survives_json(config: Any) -> None:
    """Oracle: equality after a round trip."""
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_is_frozen_and_hashable() -> None:
    """Oracle: dataclasses' own error."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        FisherConfig().rank = 3  # type: ignore[misc]
    assert len({FisherConfig(), FisherConfig(), FisherConfig(rank=1)}) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"seed": -1},
        {"output_factor": "best"},
        {"positions": "first"},
        {"sketch": "fourier"},
        {"sketch_dim": 0},
        {"sketch_tolerance": 0},
        {"sketch_tolerance": float("nan")},
        {"sketch_tolerance": float("inf")},
        {"storage_dtype": "int8"},
        {"sketch_dim": 64},  # of sketch="auto", which chooses it
        {"storage_limit": 0},
        {"target_modules": 5},
        {"target_modules": [1, 2]},
        {"exclude_modules": 5},
        {"parameters": {"a": 1}},
    ],
)
def test_a_fisher_setting_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    """Oracle: a ValueError that names the setting and the value."""
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        FisherConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_components": 0},
        {"solver": "adam"},
        {"max_iterations": 0},
        {"tolerance": -1e-3},
        {"tolerance": float("nan")},
        {"tolerance": float("inf")},
        {"tolerance": "small"},
        {"balance": "layer"},
        {"n_restarts": 0},
        {"learning_rate": 0},
        {"memory_budget": 0},
        {"seed": 1.5},
    ],
)
def test_a_decomposition_setting_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    """Oracle: a ValueError that names the setting."""
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        DecompositionConfig(**wrong)


def test_settings_of_another_version_are_refused_by_name() -> None:
    """Oracle: the error names the unknown and the missing setting."""
    values = FisherConfig().to_dict()
    with pytest.raises(FormatVersionError, match="shiny"):
        FisherConfig.from_dict({**values, "shiny": 1})
    del values["rank"]
    with pytest.raises(FormatVersionError, match="rank"):
        FisherConfig.from_dict(values)
    with pytest.raises(FormatVersionError):
        FisherConfig.from_dict([])  # type: ignore[arg-type]
