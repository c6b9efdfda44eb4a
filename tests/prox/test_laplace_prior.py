"""The example of the Laplace prior, run in full: proximal matching finds the soft threshold and its prior, the other losses do not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_figures_of_the_laplace_prior(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "examples" / "laplace_prior.py", tmp_path)  # figures are written beside the script
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("DIFFLAYERS_SHORT", None)
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    distance = {}
    for name in ("squares", "absolute values", "proximal matching"):
        row = re.search(rf"^{name} +(\d\.\d+) +(\d\.\d+) +(\d\.\d+) +(\d\.\d+)$", run.stdout, re.MULTILINE)
        assert row, run.stdout
        distance[name] = dict(zip(("mean", "median", "mode", "prior"), map(float, row.groups()), strict=True))
    matching, squares = distance["proximal matching"], distance["squares"]
    assert matching["mode"] <= 0.07
    assert matching["prior"] <= 0.13
    # The one trained on squares is worse at both, and has learned the mean.
    assert squares["mode"] > 2 * matching["mode"]
    assert squares["prior"] > matching["prior"]
    assert squares["mean"] < 0.5 * squares["mode"]
