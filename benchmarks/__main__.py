"""``python -m benchmarks``: all the benchmarks at moderate sizes, less than ten minutes on one core; ``--short`` for a smoke run."""

from __future__ import annotations

import argparse

from benchmarks import (
    cones,
    core,
    derivatives,
    hard_constraint,
    learned_prox,
    maros_meszaros,
    morphology,
    plug_and_play,
    point_clouds,
    projections,
    prox_operators,
    qp,
    rebasin,
    soft_sort,
    sorting,
    sorting_families,
    sparse_qp,
    sparse_transport,
    total_variation,
    transport,
    transport_peers,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a smoke run")
    short = parser.parse_args().short
    qp.main(short=short)
    sparse_qp.main(short=short)
    maros_meszaros.main()
    cones.main(short=short)
    core.main(short=short)
    projections.main(short=short)
    prox_operators.main(short=short)
    sorting.main(short=short)
    soft_sort.main(short=short)
    sorting_families.main(short=short)
    transport.main(short=short)
    sparse_transport.main(short=short)
    transport_peers.main(short=short)
    rebasin.main(short=short)
    point_clouds.main(short=short)
    morphology.main(short=short)
    learned_prox.main(short=short)
    total_variation.main(short=short)
    plug_and_play.main(short=short)
    derivatives.main(short=short)
    hard_constraint.main(short=short)
