"""Every check of the contract on every layer of the registry."""

from __future__ import annotations

import pytest

from tests import layers
from tests.contract import CHECKS, applies
from tests.layers import Layer
from tests.layers_cones import CONES
from tests.layers_morphology import MORPHOLOGY
from tests.layers_pde_conservation import CONSERVATION
from tests.layers_pde_constraint import HARD_CONSTRAINTS
from tests.layers_pde_derivatives import PDE_DERIVATIVES
from tests.layers_pde_mixture import MIXTURES
from tests.layers_points import POINTS
from tests.layers_projections import PROJECTIONS
from tests.layers_prox_learned import PROX_LEARNED
from tests.layers_prox_networks import PROX_NETWORKS
from tests.layers_prox_operators import PROX_OPERATORS
from tests.layers_prox_plug_and_play import PLUG_AND_PLAY
from tests.layers_prox_tv import TOTAL_VARIATION
from tests.layers_ranking import RANKING
from tests.layers_rebasin import REBASIN
from tests.layers_soft_sort import SOFT_SORT
from tests.layers_sorting import SORTING
from tests.layers_sparse_transport import SPARSE_TRANSPORT
from tests.layers_transport import TRANSPORT
from tests.layers_unbalanced import UNBALANCED

LAYERS = (
    *layers.LAYERS,
    *CONES,
    *PROJECTIONS,
    *SORTING,
    *SOFT_SORT,
    *RANKING,
    *TRANSPORT,
    *SPARSE_TRANSPORT,
    *UNBALANCED,
    *POINTS,
    *REBASIN,
    *MORPHOLOGY,
    *PROX_OPERATORS,
    *TOTAL_VARIATION,
    *PROX_NETWORKS,
    *PROX_LEARNED,
    *PLUG_AND_PLAY,
    *HARD_CONSTRAINTS,
    *PDE_DERIVATIVES,
    *MIXTURES,
    *CONSERVATION,
)

# The slow suite adds what takes long, and, for layers that are slow themselves, the nests that the others are tried on.
SLOW = {"compile", "gradcheck_of_every_entry", "gradgradcheck_of_every_entry"}
DEEP = {"vmap", "vmap_nested"}


def marks(check: str, layer: Layer) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if check in SLOW or (layer.heavy and check in DEEP) else []


CASES = [
    pytest.param(check, layer, id=f"{layer.name}-{check}", marks=marks(check, layer))
    for layer in LAYERS
    for check in CHECKS
    if applies(check, layer)
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it after a graph break
@pytest.mark.parametrize(("check", "layer"), CASES)
def test_contract(check: str, layer: Layer) -> None:
    CHECKS[check](layer)


def test_names_are_unique() -> None:
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)
