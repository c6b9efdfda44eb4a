r"""Simple points: voxels that can be deleted without a change of topology, found by bitwise logic on whole words at once.

The foreground is 8-connected in the plane and 26-connected in space, the background 4- and 6-connected. A voxel is simple when among its
neighbours

.. math:: T_{26} = 1 \quad\text{and}\quad T_6 = 1,

where :math:`T_{26}` counts the components of the foreground, and :math:`T_6` those components of the background, among the 18 neighbours
that share a face or an edge with the voxel, that share a face with it. This is Bertrand's characterization; in the plane it is Yokoi's
crossing number.

The neighbours fall into eight octants (2 × 2 × 2 blocks at the corners of the voxel), and those of one octant all touch. So
:math:`T_{26}` counts the components of a graph on the corners of a cube, with an edge of the cube present where the two octants share
foreground (an edge neighbour and its two faces). :math:`T_6` counts those of the dual graph, on the faces of the cube, where a link
crosses every edge that is absent. Components are counted by elimination: a node that is taken out links its neighbours to each other, and
counts as a component if it has none.

By planar duality the Euler characteristic of the foreground stays the same when the voxel is deleted if and only if
:math:`T_{26} = T_6`. That is weaker: a voxel that opens a tunnel and splits a component at once passes for simple.

References: Bertrand and Malandain, A new characterization of three-dimensional simple points, Pattern Recognition Letters 15 (1994);
Bertrand, A Boolean characterization of three-dimensional simple points, Pattern Recognition Letters 17 (1996);
Yokoi, Toriwaki and Fukumura, An analysis of topological properties of digitized binary pictures, 1975.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor

__all__ = ["Detection", "Neighbours", "add_bit", "at_least_two", "directions", "simple_points"]

Detection = Literal["Boolean", "EulerCharacteristic"]
Direction = tuple[int, ...]  # −1, 0 or 1 along each axis
Neighbours = Mapping[Direction, Tensor]  # words, one bit a voxel, that say whether the neighbour there is foreground


def directions(ndim: int) -> list[Direction]:
    """The directions to the 8 or 26 neighbours."""
    return [direction for direction in itertools.product((-1, 0, 1), repeat=ndim) if any(direction)]


def simple_points(neighbours: Neighbours, detection: Detection = "Boolean") -> Tensor:
    """Where the voxel in the middle is simple, be it foreground or background itself.

    Args:
        neighbours: words of one shape for each of the :func:`directions`.
        detection: by both numbers of components, or by the Euler characteristic. In the plane they agree.

    Returns:
        Words of that shape.
    """
    if len(neighbours) == 8:
        return _exactly_one(_crossings(neighbours))
    foreground, background = _components_26(neighbours), _components_6(neighbours)
    if detection == "Boolean":
        return _exactly_one(foreground) & _exactly_one(background)
    return _same_number(foreground, background)


def at_least_two(words: Iterable[Tensor]) -> Tensor:
    """Where at least two of the words have their bit set."""
    return _once_and_twice(words)[1]


def add_bit(planes: list[Tensor], bit: Tensor) -> None:
    """Add one where ``bit`` is set to the numbers whose binary digits are ``planes``, lowest first, in place.

    The last plane must be able to take the carry: whoever counts appends a plane of zeros in time.
    """
    for plane in planes:
        carry = plane & bit
        plane ^= bit
        bit = carry


def _crossings(n: Neighbours) -> list[Tensor]:
    """For each background face neighbour, whether foreground begins right after it as one walks around the pixel."""
    ring = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    return [(n[ring[i + 1]] | n[ring[(i + 2) % 8]]) & ~n[ring[i]] for i in range(0, 8, 2)]


# The edge neighbours, each with the two face neighbours that it touches.
_EDGES: list[tuple[Direction, Direction, Direction]] = [
    edge
    for a, b in itertools.product((-1, 1), repeat=2)
    for edge in (((0, a, b), (0, a, 0), (0, 0, b)), ((a, 0, b), (a, 0, 0), (0, 0, b)), ((a, b, 0), (a, 0, 0), (0, b, 0)))
]
_FACES = [direction for direction in directions(3) if direction.count(0) == 2]
# Opposite corners of each face in turn: the first four are no neighbours of each other, nor are the last four.
_CORNERS = sorted(itertools.product((-1, 1), repeat=3), key=lambda corner: corner[0] * corner[1] * corner[2])


def _components_26(n: Neighbours) -> list[Tensor]:
    links: dict[frozenset[Direction], Tensor] = {}
    octants: dict[Direction, Tensor] = {corner: n[corner] for corner in _CORNERS}
    for edge, first, second in _EDGES:
        shared = n[edge] | n[first] | n[second]
        ends = [tuple(d or side for d in edge) for side in (-1, 1)]
        links[frozenset(ends)] = shared
        for corner in ends:
            octants[corner] = octants[corner] | shared
    return _components(octants, links)


def _components_6(n: Neighbours) -> list[Tensor]:
    links: dict[frozenset[Direction], Tensor] = {
        frozenset((first, second)): ~(n[edge] | n[first] | n[second]) for edge, first, second in _EDGES
    }
    return _components({face: ~n[face] for face in _FACES}, links)


def _components(nodes: Mapping[Direction, Tensor], links: dict[frozenset[Direction], Tensor]) -> list[Tensor]:
    """One word for each node of a graph: whether it is the last of its component, as nodes are eliminated in order.

    Args:
        nodes: which of them are there.
        links: between nodes that are there. Emptied.
    """
    last = []
    for node, there in nodes.items():
        reached = {other: links.pop(pair) for other in nodes if (pair := frozenset((node, other))) in links}
        for first, second in itertools.combinations(reached, 2):
            around, pair = reached[first] & reached[second], frozenset((first, second))
            links[pair] = links[pair] | around if pair in links else around
        for link in reached.values():
            there = there & ~link
        last.append(there)
    return last


def _once_and_twice(words: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    first, second, *rest = words
    once, twice = first | second, first & second
    for word in rest:
        twice = twice | (once & word)
        once = once | word
    return once, twice


def _exactly_one(words: Sequence[Tensor]) -> Tensor:
    once, twice = _once_and_twice(words)
    return once & ~twice


def _same_number(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    counts = []
    for words in (first, second):
        planes = [words[0] ^ words[0] for _ in range(4)]  # up to eight components
        for word in words:
            add_bit(planes, word)
        counts.append(planes)
    differ = [a ^ b for a, b in zip(*counts, strict=True)]
    return ~(differ[0] | differ[1] | differ[2] | differ[3])
