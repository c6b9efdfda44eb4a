"""Every check of the contract on every layer of the registry."""

from __future__ import annotations

import pytest

from tests.contract import CHECKS, LAYERS, Layer, applies

SLOW = {"compile"}
CASES = [
    pytest.param(check, layer, id=f"{layer.name}-{check}", marks=[pytest.mark.slow] if check in SLOW else [])
    for layer in LAYERS
    for check in CHECKS
    if applies(check, layer)
]


@pytest.mark.parametrize(("check", "layer"), CASES)
def test_contract(check: str, layer: Layer) -> None:
    CHECKS[check](layer)


def test_names_are_unique() -> None:
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)
