r"""
Learn the rules of Sudoku from solved puzzles
=============================================

Nobody tells the model the rules. It sees puzzles of 4 × 4 cells and their solutions, 128 at a time, as Amos and Kolter did in their paper
on OptNet (ICML 2017, arXiv:1703.00443). A puzzle is a vector :math:`p` of 64 numbers, one for each cell and digit: 1 where a digit is
given, else 0. The model is one quadratic program,

.. math:: z(p) = \arg\min_z \tfrac{\varepsilon}{2} \|z\|^2 - p^T z \quad\text{subject to}\quad A z = b,\; z \ge 0,

and what it learns are the constraints: the 40 × 64 matrix :math:`A`, a vector :math:`z_0 > 0` that makes them feasible,
:math:`b = A z_0`, and the number :math:`\varepsilon`. The digit of a cell is the largest of its four entries of :math:`z`.

A network can learn the training boards by heart; here it is asked for boards that it has never seen.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from tqdm.auto import tqdm

from difflayers import QPLayer

parser = argparse.ArgumentParser(description="Learn 4 x 4 Sudoku with a QPLayer and with networks.")
parser.add_argument("--steps", type=int, default=160, help="training steps of the layer; the networks get three times as many")
parser.add_argument("--seeds", type=int, default=1, help="repetitions: other boards held out, other puzzles, other initial values")
options, _ = parser.parse_known_args()
if os.environ.get("DIFFLAYERS_SHORT") == "1":
    options.steps = 8
    print("DIFFLAYERS_SHORT=1: 8 training steps, to see that everything runs; the numbers mean nothing")
torch.set_num_threads(1)  # the problems are small: more threads would only wait for each other

# %%
# The puzzles
# -----------
# There are 288 complete boards. Half of them are for training, the other half for the test. A puzzle is made from a board by emptying
# cells in random order, each only if the solution stays unique. That leaves four to six givens: no cell can be spared.

BATCH = 128


def complete_boards() -> Tensor:
    """All of them, ``(288, 16)``, by adding one row after the other."""
    boards = torch.empty(1, 0, 4, dtype=torch.long)
    permutations = torch.tensor(list(itertools.permutations(range(4))))
    for row in range(4):
        grown = torch.cat([boards.repeat_interleave(24, dim=0), permutations.repeat(len(boards), 1)[:, None]], dim=1)
        above = grown[:, :row] == grown[:, row:]
        legal = ~above.any(dim=(1, 2))
        if row % 2:
            pairs = grown[:, row - 1 :].reshape(-1, 2, 2, 2)  # two rows, two boxes, two columns
            legal &= ~(pairs[:, 0, :, :, None] == pairs[:, 1, :, None, :]).any(dim=(1, 2, 3))
        boards = grown[legal]
    return boards.reshape(-1, 16)


boards = complete_boards()


def draw_puzzles(solutions: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Puzzles ``(count, 64)`` and the digits of their solutions ``(count, 16)``."""
    digits = solutions[torch.randint(len(solutions), (count,), generator=generator)]
    given = torch.ones(count, 16, dtype=torch.bool)
    for board, kept in zip(digits, given, strict=True):
        agree = boards == board
        for cell in torch.randperm(16, generator=generator).tolist():
            kept[cell] = False
            if agree[:, kept].all(dim=1).sum() > 1:
                kept[cell] = True
    return (one_hot(digits, 4) * given[..., None]).flatten(1).float(), digits


def solved(scores: Tensor, digits: Tensor) -> Tensor:
    """The share of boards without any mistake."""
    return (scores.unflatten(-1, (16, 4)).argmax(-1) == digits).all(dim=-1).float().mean()


# %%
# The model that is a quadratic program
# -------------------------------------
# The matrices are shared by the batch; only :math:`q = -p` differs from puzzle to puzzle.


class LearnedRules(nn.Module):
    def __init__(self, generator: torch.Generator, rules: int = 40) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.rand(rules, 64, generator=generator))
        self.log_z0 = nn.Parameter(torch.full((64,), 0.25).log())
        self.log_epsilon = nn.Parameter(torch.tensor(0.1).log())
        self.qp = QPLayer()

    def forward(self, puzzles: Tensor) -> Tensor:
        P = self.log_epsilon.exp() * torch.eye(64)
        return self.qp(P, -puzzles, A=self.A, b=self.A @ self.log_z0.exp(), lb=torch.zeros(64))


# %%
# The networks
# ------------
# One has as many parameters as the layer. The other two are much larger: a perceptron, and convolutions that see the board as an image
# with four channels. They are trained on the same puzzles, with the loss that suits them, three times as many steps.


class Convolutions(nn.Module):
    def __init__(self, width: int = 64, depth: int = 5) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(4 if layer == 0 else width, width, 3, padding=1) for layer in range(depth)]
        hidden = [module for convolution in convolutions for module in (convolution, nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Conv2d(width, 4, 1))

    def forward(self, puzzles: Tensor) -> Tensor:
        image = puzzles.unflatten(1, (4, 4, 4)).permute(0, 3, 1, 2)
        return self.layers(image).permute(0, 2, 3, 1).flatten(1)


def perceptron(width: int, depth: int) -> nn.Sequential:
    sizes = [64] + [width] * depth
    hidden = [module for a, b in itertools.pairwise(sizes) for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 64))


# %%
# Training
# --------
# The layer's loss is the squared distance of :math:`z` from the solution, as in the paper; the networks' is cross-entropy.


def layer_loss(z: Tensor, digits: Tensor) -> Tensor:
    return mse_loss(z, one_hot(digits, 4).flatten(1).float())


def network_loss(scores: Tensor, digits: Tensor) -> Tensor:
    return cross_entropy(scores.unflatten(-1, (16, 4)).flatten(0, 1), digits.flatten())


def train(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    groups: list[dict],
    steps: int,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    generator: torch.Generator,
    label: str,
) -> list[tuple[int, float]]:
    """Train ``model``; sixteen times on the way, note the step and the share of 64 test puzzles that it solves."""
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps, pct_start=0.1)
    history = []
    with tqdm(range(steps), desc=label) as bar:
        for step in bar:
            chosen = torch.randint(len(training[0]), (BATCH,), generator=generator)
            loss = loss_fn(model(training[0][chosen]), training[1][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % max(1, steps // 16) == 0:
                with torch.no_grad():
                    history.append((step + 1, solved(model(test[0][:64]), test[1][:64]).item()))
                bar.set_postfix_str(f"loss {loss.item():.4f}, solved {history[-1][1]:.0%}", refresh=False)
    return history


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


names = ("network, same size", "large perceptron", "large convolutions", "learned rules")
scores = {name: [] for name in names}
for seed in range(options.seeds):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the networks' initial values
    order = torch.randperm(len(boards), generator=generator)
    training = draw_puzzles(boards[order[:144]], 1000, generator)
    test = draw_puzzles(boards[order[144:]], 500, generator)
    rules = LearnedRules(generator)
    start = rules.A.detach().clone()
    models = dict(zip(names, (perceptron(20, 1), perceptron(512, 2), Convolutions(32, 4), rules), strict=True))
    histories, seconds = {}, {}
    for name, model in models.items():
        steps, loss_fn, groups = 3 * options.steps, network_loss, [{"params": model.parameters(), "lr": 1e-2}]
        if model is rules:
            steps, loss_fn = options.steps, layer_loss
            groups = [{"params": [rules.A, rules.log_z0], "lr": 0.6}, {"params": [rules.log_epsilon], "lr": 0.05}]
        began = time.perf_counter()
        histories[name] = train(model, loss_fn, groups, steps, training, test, generator, f"seed {seed}, {name:18}")
        seconds[name] = time.perf_counter() - began
        with torch.no_grad():
            seen, unseen = model(training[0][:500]), model(test[0])
        cells = (unseen.unflatten(-1, (16, 4)).argmax(-1) == test[1]).float().mean()
        result = (solved(seen, training[1][:500]), solved(unseen, test[1]), cells)
        scores[name].append([100 * value.item() for value in result] + [seconds[name]])

print(f"\nper cent of puzzles solved ({options.seeds} seed(s), {options.steps} steps, {3 * options.steps} for the networks)")
print(f"{'':20}{'parameters':>10}{'training boards':>17}{'unseen boards':>15}{'cells of these':>16}{'seconds':>9}")
for name, model in models.items():
    means = torch.tensor(scores[name]).mean(0).tolist()
    print(f"{name:20}{count_parameters(model):10}{means[0]:17.1f}{means[1]:15.1f}{means[2]:16.1f}{means[3]:9.1f}")
if options.seeds > 1:
    print("learned rules, each seed: " + "  ".join(f"{row[1]:.1f}" for row in scores["learned rules"]))

# %%
# Which rules were learned?
# -------------------------
# Those of Sudoku, nearly. The true rules are 64 equations (a cell has one digit, and each digit is once in every row, column and box), 40
# of them independent; that is why :math:`A` was given 40 rows.
# An equation that holds for every board is a combination of them, and a matrix with these rows, however combined, has the same row
# space. So the orthogonal projection on the row space of the learned :math:`A` can be compared with that of the true rules. Their
# overlap is the mean squared cosine of the angles between the two spaces: 40/64 for a random matrix, 1 for the true rules.


def true_rules() -> Tensor:
    row, column, digit = torch.meshgrid(*(torch.arange(4),) * 3, indexing="ij")
    box = row // 2 * 2 + column // 2
    groups = [4 * row + column, 4 * row + digit, 4 * column + digit, 4 * box + digit]
    return torch.cat([one_hot(group.flatten(), 16).T for group in groups]).float()


def projection(matrix: Tensor, rank: int = 40) -> Tensor:
    basis = torch.linalg.svd(matrix)[2][:rank]
    return basis.T @ basis


maps = {"before training": projection(start), "learned": projection(rules.A.detach()), "true rules": projection(true_rules())}
overlap = {name: ((found * maps["true rules"]).sum() / 40).item() for name, found in maps.items()}
print(f"\noverlap of the row spaces: {overlap['before training']:.3f} before training, {overlap['learned']:.3f} learned")

figure, axes = plt.subplots(2, 4, figsize=(15, 7.5), layout="constrained", height_ratios=(1, 1.25))
puzzle, solution = test[0][:1], test[1][0]
with torch.no_grad():
    drawn = {"an unseen puzzle": puzzle} | {name: models[name](puzzle) for name in ("large convolutions", "learned rules")}
for axis, (name, values) in zip(axes[0], drawn.items(), strict=False):
    digits = values.view(16, 4).argmax(-1)
    given = puzzle.view(16, 4).any(-1)
    for cell in range(16):
        if name == "an unseen puzzle" and not given[cell]:
            continue
        colour = "black" if given[cell] else ("tab:green" if digits[cell] == solution[cell] else "tab:red")
        weight = "bold" if given[cell] else "normal"
        axis.text(
            cell % 4 + 0.5, cell // 4 + 0.5, f"{digits[cell] + 1}", color=colour, fontweight=weight, ha="center", va="center", fontsize=18
        )
    for line in range(5):
        width = 2.5 if line % 2 == 0 else 0.7
        axis.axhline(line, color="black", linewidth=width)
        axis.axvline(line, color="black", linewidth=width)
    mistakes = int((digits != solution).sum())
    axis.set(title=name if name == "an unseen puzzle" else f"{name}, mistakes: {mistakes}", xticks=[], yticks=[], aspect="equal")
    axis.set(xlim=(-0.05, 4.05), ylim=(4.05, -0.05), frame_on=False)
for name, history in histories.items():
    steps, share = zip(*history, strict=True)
    axes[0, 3].plot([step / steps[-1] for step in steps], [100 * value for value in share], ".-", label=name)
axes[0, 3].set(title="unseen boards solved (%)", xlabel="part of the training done", ylim=(-3, 103))
axes[0, 3].legend(frameon=False, fontsize=8)
for axis, (name, found) in zip(axes[1], maps.items(), strict=False):
    axis.imshow(found, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    axis.set(title=f"row space, {name}\noverlap {overlap[name]:.3f}", xticks=[], yticks=[], xlabel="64 pairs of cell and digit")
cosines = {name: torch.linalg.eigvalsh(maps["true rules"] @ found @ maps["true rules"])[-40:].flip(0) for name, found in maps.items()}
for name, values in list(cosines.items())[:2]:
    axes[1, 3].plot(range(1, 41), values.clamp(0, 1), ".-", label=name)
axes[1, 3].set(title="squared cosines of the 40 angles\nto the true rules", xlabel="angle", ylim=(-0.03, 1.03))
axes[1, 3].legend(frameon=False)

here = Path(__file__).parent if "__file__" in globals() else Path.cwd()
(here / "figures").mkdir(exist_ok=True)
figure.savefig(here / "figures" / "sudoku_optnet.png", dpi=150)
print("figure saved: figures/sudoku_optnet.png")
