"""Experts on two processes: the checks of :mod:`tests.pde.two_processes`, by spawn and by torchrun; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.func import grad, jvp, vmap

from difflayers.errors import DiffLayersError
from difflayers.pde.sharding import Slots, process_group
from tests.pde import two_processes

ROOT = Path(__file__).resolve().parents[2]


def test_two_spawned_processes(tmp_path: Path) -> None:
    multiprocessing.spawn(two_processes.spawned, (str(tmp_path / "meeting_point"),), nprocs=2)


def test_two_processes_by_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(two_processes.__file__)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("all checks passed") == 2, result.stdout
    assert "Warning" not in result.stderr, result.stderr


@pytest.fixture
def world(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting_point'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_transforms_of_gathering(world: dist.ProcessGroup) -> None:
    slots = Slots(3, world)
    generator = torch.Generator().manual_seed(0)
    x, t, s = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(3))

    def cubes(x: Tensor) -> Tensor:
        return slots.gather(x**3)

    torch.testing.assert_close(jvp(cubes, (x,), (t,))[1], 3 * x**2 * t)
    twice = jvp(lambda x: jvp(cubes, (x,), (t,))[1], (x,), (s,))[1]
    torch.testing.assert_close(twice, 6 * x * t * s)
    over = jvp(lambda x: grad(lambda x: cubes(x).square().sum())(x), (x,), (t,))[1]
    torch.testing.assert_close(over, 30 * x**4 * t)
    torch.testing.assert_close(vmap(cubes, in_dims=-1, out_dims=-1)(x.unsqueeze(-1)).squeeze(-1), x**3)
    torch.testing.assert_close(vmap(grad(lambda x: cubes(x).square().sum()))(x), 6 * x**5)
    with pytest.raises(DiffLayersError, match="reverse over reverse"):
        grad(lambda x: grad(lambda x: cubes(x).square().sum())(x).sum())(x)


def test_a_device_mesh_is_a_group(world: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (1,))
    assert isinstance(process_group(mesh), dist.ProcessGroup)
    assert process_group(world) is world
    assert process_group(None) is None


def test_one_process_has_every_expert() -> None:
    slots = Slots(3)
    own = torch.randn(2, 3, 4)
    assert slots.counts == (3,)
    assert slots.gather(own) is own


@pytest.mark.parametrize("group", ["gloo", 0])
def test_what_is_no_process_group_is_refused(group: object) -> None:
    with pytest.raises(DiffLayersError, match="not a process group"):
        process_group(group)
