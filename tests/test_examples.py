"""Every example runs as it stands: in short mode, from another folder, without the network, and says what it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Lines that each example prints, by its name; every {} is a finite number.
LINES = {
    "quickstart": ["noisy {} {} {}", "total variation {} {} {}", "network alone {} {} {}", "network + layer {} {} {}"],
    "degenerate_derivatives": ["row given 3 times: sum of multipliers {}", "smoothing=0.1: workers in the wrong job before {}"],
    "custom_root_scipy": ["one penalty, grid search {} {} {}", "penalty by distance, gradient {} {} {}"],
    "sudoku_optnet": ["large perceptron 328768 {} {} {} {}", "learned rules 2625 {} {} {} {}", "{} before training, {} learned"],
    "decision_focused": ["squared error {} {} {} {} %", "end to end {} {} {} {} %", "oracle {} {} {} {} %"],
    "mpc_learned_cost": ["large network 1249 {} % {} % {} {} % {} % {}", "learned controller 21 {} % {} % {} {} % {} % {}"],
    "learning_to_rank": ["squared error {} ± {} {} ± {}", "RankNet {} ± {} {} ± {}", "Spearman loss {} ± {} {} ± {}"],
    "topk_classification": ["cross-entropy" + 6 * " {} ± {}", "top 1 and top 5" + 6 * " {} ± {}"],
    "relu_convex": [
        "9902 patterns of at most 9902; 9902 - 19800 + 9900 = 2",
        "d optimal value / d beta {} penalty {}",
        "least squares {} {} {}",
        "global optimum, grid {} {} {} {}",
        "global optimum, gradient {} {} {} {}",
    ],
    "relaxations": ["optimal largest error 0.0625 / s, least slope {}", "logistic from -3.0 to {} in 20 steps"],
    "sorting_supervision": ["logistic, odd_even 20 {} {} {}", "cauchy, odd_even 20 {} {} {}", "NeuralSort {} {} {} {}", "ranks 1 {} {} {}"],
    "moe_routing": [
        "softmax {} ± {} {} ± {} {} ± {}",
        "transport {} ± {} {} ± {} {} ± {}",
        "transport, in training: {} % of the loads missed",
    ],
    "colour_transfer": ["histograms {} {} {}", "plan, ε = 0.001 {} {} {}", "learned, λ = 10 {} {} {}"],
    "transport_map": ["plain, λ = 0 {} ± {} {} ± {} {} ± {} {} ± {}", "plain, λ = 1 {} ± {} {} ± {} {} ± {} {} ± {}"],
    "align_networks": [
        "perceptron, pair 0: {} % and {} % of 500 digits right",
        "weight matching {} {}",
        "Sinkhorn alone {} {}",
        "matching, Sinkhorn {} {}",
        "naive, not repaired {} {}",
    ],
    "continual_learning": [
        "EWC" + 3 * " {} ± {}",
        "averaging as it is" + 3 * " {} ± {}",
        "Sinkhorn, trained" + 3 * " {} ± {}",
        "colleagues merged" + 3 * " {} ± {}",
        "all tasks at once" + 3 * " {} ± {}",
        "units that weight matching renames, trained on: ",
    ],
    "skeletons": [
        "knot 1 1 0 1 1 0 1 1 0",
        "pierced ball 1 1 0 1 1 0",
        "hollow ball 1 0 1 1 0 1",
        "length of the vessels' skeleton: {} ± {} pixels",
        "radius along it: median {}",
    ],
    "skeleton_registration": [
        "not moved {} ± {} {} {} {}",
        "images 1.0 {} ± {} {} {} {}",
        "soft skeletons 1.0 {} ± {} {} {} {}",
        "skeleton, once 1.0 {} ± {} {} {} {}",
        "skeletons 1.0 {} ± {} {} {} {}",
    ],
    "vessel_segmentation": [
        "before {} ± {} {} ± {} {} ± {} {} ± {}",
        "soft clDice, α = {} {} ± {} {} ± {} {} ± {} {} ± {}",
        "clDice, mask, α = {} {} ± {} {} ± {} {} ± {} {} ± {}",
        "clDice, reference − Dice {} ± {} {} ± {} {} ± {} {} ± {}",
        "skeleton recall − Dice {} ± {} {} ± {} {} ± {} {} ± {}",
    ],
    "sparse_autoencoder": [
        "TopK 32 {} ± {} {} {} {} {}",
        "AbsTopK, 3 steps 128 {} ± {} {} {} {} {} {} {}",
        "transformer, its stream not replaced: {} % right",
    ],
    "proximal_lora": [
        "turned by 90°: before adaptation {} % right",
        "LoRA, rank 8 {} ± {} 10448",
        "gate, λ = 0.02 {} ± {}",
        "fine-tuning {} ± {} 118282",
    ],
    "laplace_prior": ["squares {} {} {} {}", "absolute values {} {} {} {}", "proximal matching {} {} {} {}"],
    "digit_prior": [
        "proximal matching {} dB",
        "squared error {} dB",
        "prior, proximal matching {} % {} % {} % {} %",
        "prior from raw pixels {} % {} % {} % {} %",
    ],
    "plug_and_play_imaging": [
        "deblurring total variation {} {}",
        "deblurring proximal network {} {}",
        "compressed sensing ordinary network {} {}",
        "compressed sensing, proximal network: the last iteration moves the image by",
    ],
    "learned_regularization": [
        "blurred {} ± {}",
        "total variation {} ± {}",
        "5 steps unrolled {} ± {} {} ± {} {} {}",
        "fixed point {} ± {} {} ± {} {} {}",
    ],
    "conservation": [
        "ProbConserv {} {} ± {} {} ± {} {} ± {}",
        "trained through it {} {} ± {} {} ± {}",
        "penalty {} {} ± {} {} ± {}",
    ],
    "distributed_experts": [
        "gradient of the network, 2 processes against one: relative difference",
        "one process {} {} {}",
        "process 1 {} {} {}",
        "error on initial conditions never seen: {} before training, {} after 2 steps",
    ],
    "jacobian_descent": ["average {} {} {} × {} × {} {} {} %", "UPGrad {} {} {} × {} × {} {} {} %"],
    "navier_stokes_experts": [
        "untrained 0.0 {} {} {} {} {}",
        "soft penalty {} {} {} {} {} {}",
        "soft penalty, 3 × steps {} {} {} {} {} {}",
        "4 experts {} {} {} {} {} {}",
    ],
}
SEEDED = (
    "continual_learning",
    "quickstart",
    "decision_focused",
    "proximal_lora",
    "sparse_autoencoder",
    "learned_regularization",
    "learning_to_rank",
    "moe_routing",
    "mpc_learned_cost",
    "topk_classification",
    "transport_map",
    "vessel_segmentation",
)
OPTIONS = {name: ["--seeds", "1"] for name in SEEDED}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_in_short_mode(example: Path, tmp_path: Path) -> None:
    for package in ("matplotlib", "mlxtend", "skfolio", "skimage", "sklearn"):
        pytest.importorskip(package)
    script = Path(shutil.copy(example, tmp_path))  # figures are written beside the script: here, not over those of a full run
    environment = os.environ | {
        "DIFFLAYERS_SHORT": "1",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",  # nobody answers there: a download would fail
    }
    command = [sys.executable, str(script), *OPTIONS.get(example.stem, [])]
    result = subprocess.run(command, cwd=tmp_path.parent, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Warning" not in result.stderr
    assert "DIFFLAYERS_SHORT=1" in result.stdout
    for line in LINES[example.stem]:
        pattern = r"\s+".join(r"[-+]?\d+\.\d+" if word == "{}" else re.escape(word) for word in line.split())
        assert re.search(pattern, result.stdout), f"{line!r} is not in\n{result.stdout}"
    figures = list((tmp_path / "figures").glob("*.png"))
    assert figures
    for figure in figures:
        assert figure.stem.startswith(example.stem)
        assert figure.stat().st_size > 10_000
