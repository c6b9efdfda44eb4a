"""Permutation specs: found for every architecture, applied, checked, refused where nothing is proved."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from difflayers.errors import ShapeError, UnsupportedModuleError
from difflayers.rebasin import PermutationSpec
from difflayers.rebasin.axes import Group, Product
from difflayers.rebasin.inference import Unprovable

from .architectures import ARCHITECTURES, ResNet


def generic(model: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics of a network, all different, all positive where they have to be."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value.double() * (1 + torch.rand(value.shape, generator=generator)) + 0.1 * torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else value
        for name, value in model.state_dict().items()
    }


@pytest.fixture(params=sorted(ARCHITECTURES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, list[int]]:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[request.param]
    model, x = architecture.build().double().eval(), architecture.example()
    return model, x.double() if x.is_floating_point() else x, architecture.groups


def test_random_permutations_leave_the_function_unchanged(case) -> None:
    model, x, groups = case
    spec = PermutationSpec.from_module(model, x)
    assert sorted(spec.sizes.values()) == groups
    params = spec.apply(generic(model), {})
    permutations = spec.random(generator=torch.Generator().manual_seed(2))
    renamed = spec.apply(params, permutations)
    for training in (False, True):
        model.train(training)
        # Dropout would draw its own noise for each unit.
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        before, after = (functional_call(model, copy.deepcopy(state), x) for state in (params, renamed))
        assert (before - after).abs().max() <= 1e-9 * before.abs().max()
    back = spec.apply(renamed, spec.inverse(permutations))
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_every_group_is_needed(case) -> None:
    """Each group moves weights, and leaving out one of them changes the function."""
    model, x, _ = case
    spec = PermutationSpec.from_module(model, x)
    params = spec.apply(generic(model), {})
    before = functional_call(model, params, x)
    for group, size in spec.sizes.items():
        turned = {group: torch.arange(size).roll(1)}
        renamed = spec.apply(params, turned)
        moved = [name for name in renamed if not torch.equal(renamed[name], params[name]) and name not in spec.tied]
        assert len(moved) >= 2
        # A weight whose neighbours are not renamed with it.
        broken = {**params, moved[0]: renamed[moved[0]], **{name: renamed[moved[0]] for name in spec.tied if spec.tied[name] == moved[0]}}
        assert not torch.allclose(functional_call(model, broken, x), before, rtol=1e-9, atol=1e-9)


def test_matrices_of_permutations_do_what_permutations_do(case) -> None:
    model, x, _ = case
    spec = PermutationSpec.from_module(model, x)
    params = generic(model)
    permutations = spec.random(generator=torch.Generator().manual_seed(3))
    matrices = {group: torch.eye(len(value), dtype=torch.float64)[value] for group, value in permutations.items()}
    hard, soft = spec.apply(params, permutations), spec.apply(params, matrices)
    for name in params:
        torch.testing.assert_close(hard[name], soft[name], rtol=0, atol=1e-14)


def test_apply_is_differentiable_in_weights_and_matrices() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double(), torch.randn(2, 1, 3, 3).double()
    spec = PermutationSpec.from_module(model, x)
    names = list(model.state_dict())

    def renamed(matrix: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(spec.apply(dict(zip(names, weights, strict=True)), {"0": matrix}).values())

    weights = [value.detach().requires_grad_() for value in model.state_dict().values()]
    assert torch.autograd.gradcheck(renamed, (torch.rand(2, 2, dtype=torch.float64, requires_grad=True), *weights))


def test_composition() -> None:
    torch.manual_seed(0)
    model, x = ResNet(), torch.randn(1, 3, 8, 8)
    spec = PermutationSpec.from_module(model, x)
    state = dict(model.state_dict())
    first, second = spec.random(), spec.random()
    once, twice = spec.apply(state, spec.compose(first, second)), spec.apply(spec.apply(state, first), second)
    assert all(torch.equal(once[name], twice[name]) for name in state)
    undone = spec.compose(first, spec.inverse(first))
    assert all(torch.equal(undone[group], value) for group, value in spec.identity().items())
    assert set(spec.compose({}, {})) == set(spec.sizes)


def test_tied_weights_come_out_as_one_tensor() -> None:
    architecture = ARCHITECTURES["language model"]
    model = architecture.build()
    spec = PermutationSpec.from_module(model, architecture.example())
    assert spec.tied == {"decoder.weight": "embedding.weight"}
    renamed = spec.apply(model.state_dict(), spec.random())
    assert renamed["decoder.weight"] is renamed["embedding.weight"]


def test_the_model_is_left_alone() -> None:
    model, x = ResNet().train(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    PermutationSpec.from_module(model, x)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_single_modules_and_several_inputs() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 10, batch_first=True)
    spec = PermutationSpec.from_module(layer, [torch.randn(2, 3, 8), torch.randn(2, 4, 8)])
    assert sorted(spec.sizes.values()) == [2, 2, 4, 4, 4, 4, 10]
    assert PermutationSpec.from_module(nn.Linear(3, 4), torch.randn(2, 3)).sizes == {}


def test_arguments_with_defaults() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            h = torch.tanh(self.up(x)) * scale
            return self.down(h if mask is None else h * mask)

    model, x = Masked(), torch.randn(4, 3)
    assert PermutationSpec.from_module(model, x).sizes == {"up": 5}
    assert PermutationSpec.from_module(model, [x, torch.rand(5)]).sizes == {}


def test_an_unknown_operation_is_named() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.fft.fft(self.up(x)).real)

    model, x = Spectral(), torch.randn(4, 3)
    with pytest.raises(UnsupportedModuleError, match=r"fft_fft.*overrides"):
        PermutationSpec.from_module(model, x)
    assert PermutationSpec.from_module(model, x, overrides={torch.fft.fft: "fixed"}).sizes == {}
    # Nothing is believed that the example refutes.
    with pytest.raises(UnsupportedModuleError, match=r"renaming units changes the output of Spectral.*up: "):
        PermutationSpec.from_module(model, x, overrides={torch.fft.fft: "elementwise"})


def test_an_unknown_module_is_named() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > 0) else x

    model, x = nn.Sequential(nn.Linear(3, 6), Power(), nn.Linear(6, 2)), torch.randn(4, 3)
    with pytest.raises(UnsupportedModuleError, match=r"module '1' \(Power\) calls .*__bool__: the values of a tensor decide"):
        PermutationSpec.from_module(model, x)
    for overrides in ({"1": "elementwise"}, {Power: "elementwise"}, {"1": lambda call, x: x.terms}):
        assert PermutationSpec.from_module(model, x, overrides=overrides).sizes == {"0": 6}
    unfolded = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Unfold(2))
    with pytest.raises(UnsupportedModuleError, match=r"module '1' \(Unfold\) calls unfold: .*overrides=\{'1'"):
        PermutationSpec.from_module(unfolded, torch.randn(1, 1, 3, 3))

    def refuses(call, *args):
        raise Unprovable("moons of Jupiter")

    with pytest.raises(UnsupportedModuleError, match="moons of Jupiter"):
        PermutationSpec.from_module(model, x, overrides={"1": refuses})


def test_a_tensor_of_unknown_origin_is_refused() -> None:
    scale = torch.rand(6, dtype=torch.float64)

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * scale)

    with pytest.raises(UnsupportedModuleError, match=r"Outside calls .*mul.*: a tensor \(6,\) comes from where nothing is seen"):
        PermutationSpec.from_module(Outside(), torch.randn(4, 3))


def test_branches_on_sizes_and_types_need_no_care() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor | None = None, *parts: Tensor, **options: Tensor) -> Tensor:
            if isinstance(x, Tensor) and x.shape[0] > 1:
                x, *_ = torch.tanh(self.up(x)).split(len(x) // 2)
            return self.down(sum([x, *parts, *options.values()]))

    model, x = Branching(), torch.randn(4, 3)
    assert PermutationSpec.from_module(model, x).sizes == {"up": 6}
    assert PermutationSpec.from_module(model, {"x": x}).sizes == {"up": 6}
    assert PermutationSpec.from_module(model, {"x": x, "shift": torch.randn(6)}).sizes == {}


def test_lookup_tables() -> None:
    """A relative position bias: a row for each offset, a column for each head."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.table = nn.Parameter(torch.randn(5, 2))
            self.register_buffer("offset", torch.arange(3)[:, None] - torch.arange(3) + 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
            bias = self.table[self.offset.flatten()].view(3, 3, 2).permute(2, 0, 1)
            weights = torch.softmax(torch.einsum("bhqd, bhkd -> bhqk", q, k) + bias, dim=-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    assert sorted(PermutationSpec.from_module(Biased(), torch.randn(2, 3, 8)).sizes.values()) == [2, 4, 4]


def test_parametrized_weights() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    for parametrization in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        network = model()
        parametrization(network[0]), parametrization(network[2])
        spec = PermutationSpec.from_module(network, torch.randn(4, 3))
        assert sorted(spec.sizes.values()) == [5, 6]


def test_new_tensors_of_one_value() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            return self.down(torch.cat([torch.maximum(h, torch.zeros_like(h)), h.new_ones(len(h), 2)], 1))

    # The two ones may be exchanged as well.
    assert sorted(PermutationSpec.from_module(Padded(), torch.randn(4, 3)).sizes.values()) == [2, 6]


def test_units_that_are_known_by_number_stay() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            return self.down(h) + h[:, :2] + h.cumsum(1)[:, 3:4]

    assert PermutationSpec.from_module(First(), torch.randn(4, 3)).sizes == {}


def test_buffers_that_are_not_saved_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 2)
            self.register_buffer("scale", torch.rand(6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)) * self.scale)

    assert PermutationSpec.from_module(Scaled(), torch.randn(4, 3)).sizes == {}


def test_by_hand() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), torch.randn(2, 1, 4, 4)
    state = model.state_dict()
    flat = Product((Group("c", 4), Group("pixel", 4)))
    hand = {"0.weight": ("c", None, None, None), "0.bias": ("c",), "3.weight": (None, flat)}
    spec = PermutationSpec.from_axes(state, hand)
    assert spec.sizes == {"c": 4, "pixel": 4}
    assert [(place.name, place.dim) for place in spec.occurrences("c")] == [("0.weight", 0), ("0.bias", 0), ("3.weight", 1)]
    with pytest.raises(UnsupportedModuleError, match=r"pixel: 3\.weight"):
        spec.verify(model, x)
    del hand["0.bias"]
    with pytest.raises(UnsupportedModuleError, match=r"c: 0\.weight, 3\.weight"):
        PermutationSpec.from_axes(state, hand).verify(model, x)
    for axes, message in (
        ({"weight": ("c",)}, "no weight or buffer is called weight"),
        ({"0.bias": ("c", None)}, r"0.bias has the shape \(4,\)"),
        ({"0.bias": (flat,)}, "an axis of 16 entries does not fit"),
        ({"0.bias": ("c",), "3.bias": ("c",)}, "'c' has 2 units here and 4 elsewhere"),
    ):
        with pytest.raises(ShapeError, match=message):
            PermutationSpec.from_axes(state, axes)


def test_what_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    spec = PermutationSpec.from_module(model, torch.randn(4, 2))
    state = model.state_dict()
    for permutations, message in (
        ({"1": torch.arange(3)}, "no group is called '1'; there are 0"),
        ({"0": torch.arange(4)}, r"a permutation of 3 units is int64 \(3,\) or floating \(3, 3\), got torch.int64 \(4,\)"),
        ({"0": torch.rand(3)}, r"got torch.float32 \(3,\)"),
        ({"0": torch.tensor([0, 0, 1])}, r"\[0, 0, 1\] is not a permutation of 0 … 2"),
    ):
        with pytest.raises(ShapeError, match=message):
            spec.apply(state, permutations)
    with pytest.raises(ShapeError, match="knows no weight or buffer 'w'"):
        spec.apply({"w": torch.rand(3)}, {})
    with pytest.raises(ShapeError, match=r"0.bias: got the shape \(4,\)"):
        spec.apply({"0.bias": torch.rand(4)}, {})
    with pytest.raises(ShapeError, match="no group"):
        spec.occurrences("1")
    assert repr(spec) == "PermutationSpec(0: 3)"
