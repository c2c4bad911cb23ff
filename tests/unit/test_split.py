"""Cutting a module into stages: where, what goes over a cut, and what cannot be cut."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparkdl.errors import ConfigError
from sparkdl.parallel.split import Stages, check_split, plan_cuts, split_module


class Block(nn.Module):
    """A residual block, with a layer that works in place."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, features), nn.Linear(features, features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.dropout(torch.relu_(self.first(x)))
        if mask is not None:
            hidden = hidden * mask
        return x + self.second(hidden)


class DataDependent(nn.Module):
    """A forward that no graph holds."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(features, features), nn.Tanh(), nn.Linear(features, features))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2 if bool(x.sum() > 0) else x)


class Net(nn.Module):
    """Not a chain: sizes, a mask and a buffer are used late, the output is a dict, and some inputs have defaults."""

    position: Tensor

    def __init__(self, *, odd: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 8)
        self.layers = nn.ModuleList([Block(8), DataDependent(8) if odd else Block(8), Block(8)])
        self.head = nn.Linear(8, 3)
        self.register_buffer("position", torch.arange(8.0))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        rows = x.shape[0]
        hidden = self.embedding(x) + self.position
        for layer in self.layers:
            hidden = layer(hidden, mask) if isinstance(layer, Block) else layer(hidden)
        return {"scores": self.head(hidden.view(rows, -1)) * scale + self.position[0], "hidden": hidden}


def run(stages: Stages, inputs: tuple[Tensor, ...]) -> Any:
    given: Any = inputs
    for number, stage in enumerate(stages.modules):
        given = stage(*given)
        if number < len(stages.received):
            assert [(value.shape, value.dtype) for value in given] == [
                (value.shape, value.dtype) for value in stages.received[number]
            ]
    return stages.restore(given)


def parameters_of(stages: Stages) -> list[list[str]]:
    return [[name for name, _ in stage.named_parameters()] for stage in stages.modules]


X, MASK = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])


# ---- where to cut ----------------------------------------------------------------------------------------------------
def cheapest(costs: list[float], stages: int, crossing: list[float], trainable: list[bool]) -> float:
    """By trying all."""
    best = math.inf
    for cuts in itertools.combinations(range(1, len(costs)), stages - 1):
        worst = 0.0
        for start, stop in itertools.pairwise([0, *cuts, len(costs)]):
            ends = (crossing[start] if start else 0) + (crossing[stop] if stop < len(costs) else 0)
            worst = max(worst, sum(costs[start:stop]) + ends if any(trainable[start:stop]) else math.inf)
        best = min(best, worst)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_have_a_cheaper_most_expensive_stage(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    number, stages = 4 + seed % 5, 1 + seed % 4
    costs = torch.rand(number, generator=random).tolist()
    crossing = (torch.rand(number, generator=random) / 2).tolist()
    crossing[seed % number] = math.inf
    trainable = (torch.rand(number, generator=random) < 0.7).tolist()
    cuts = plan_cuts(costs, stages, crossing=crossing, trainable=trainable)
    expected = cheapest(costs, stages, crossing, trainable)
    if cuts is None:
        assert expected == math.inf
        return
    worst = 0.0
    for start, stop in itertools.pairwise([0, *cuts, number]):
        assert any(trainable[start:stop])
        ends = (crossing[start] if start else 0) + (crossing[stop] if stop < number else 0)
        worst = max(worst, sum(costs[start:stop]) + ends)
    assert worst == pytest.approx(expected)


def test_a_row_of_pieces_is_cut_evenly() -> None:
    assert plan_cuts([1, 2, 3, 4, 5, 6, 7, 8, 9], 3, crossing=[0] * 9, trainable=[True] * 9) == [5, 7]


# ---- cutting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("stages", "cut_points"), [(1, ()), (2, ()), (3, ()), (5, ()), (3, ("layers.0", "layers.2"))])
def test_stages_compute_what_the_module_computes(stages: int, cut_points: tuple[str, ...]) -> None:
    for net, inputs in ((Net(), (X,)), (Net(), (X, MASK)), (Net(odd=True), (X,))):
        cut = split_module(net, inputs, stages, cut_points)
        assert len(cut.modules) == stages
        torch.manual_seed(3)
        expected = net(*inputs)
        torch.manual_seed(3)
        found = run(cut, inputs)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value)


def test_stages_hold_the_modules_own_parameters_under_their_names() -> None:
    net = Net()
    cut = split_module(net, (X,), 3, ["layers.1", "head"])
    own = dict(net.named_parameters())
    names = parameters_of(cut)
    assert sorted(itertools.chain(*names)) == sorted(own)
    assert "layers.0.second.weight" in names[0]
    assert "layers.1.first.weight" in names[1]
    assert names[2] == ["head.weight", "head.bias"]
    for stage in cut.modules:
        assert all(value is own[name] for name, value in stage.named_parameters())
    assert [len(received) for received in cut.received] == [1, 2], "no sizes, and no mask that is not given"
    assert [name for name, _ in cut.modules[2].named_buffers()] == ["position"]


def test_only_what_is_trained_gets_a_gradient_back() -> None:
    net = Net()
    cut = split_module(net, (X, MASK), 2, ["layers.1"])
    assert [value.requires_grad for value in cut.received[0]] == [False, True], "the mask needs none"
    net.embedding.requires_grad_(False)
    net.layers[0].requires_grad_(False)
    net.layers[1].first.requires_grad_(False)  # type: ignore[union-attr]
    cut = split_module(net, (X,), 2, ["layers.2"])
    assert [value.requires_grad for value in cut.received[0]] == [True]


def test_the_module_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    cut = split_module(net, (X,), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert cut.changing == {id(net[1].running_mean), id(net[1].running_var), id(net[1].num_batches_tracked)}


def test_torchs_own_layers_are_looked_into_where_there_is_no_other_way() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"encoded": self.encoder(x)}

    net, x = Encoder(), torch.randn(2, 3, 4)
    cut = split_module(net, (x,), 2, ["encoder.layers.1"])
    assert torch.allclose(run(cut, (x,))["encoded"], net(x)["encoded"], atol=1e-6)
    names = parameters_of(cut)
    assert {name.split(".")[2] for name in names[0]} == {"0"}
    assert {name.split(".")[2] for name in names[1]} == {"1"}
    assert all(value is net.get_parameter(name) for stage in cut.modules for name, value in stage.named_parameters())


# ---- what cannot be cut ----------------------------------------------------------------------------------------------
def test_more_stages_than_layers_are_refused_with_both_numbers() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"3 pipeline stages need as many layers .* Sequential has 2 \(0, 2\)"):
        check_split(net, 3, (), ["0.weight", "0.bias", "2.weight", "2.bias"])
    with pytest.raises(ConfigError, match=r"2 pipeline stages need as many layers .* Sequential has 1 \(2\)"):
        check_split(net, 2, (), ["2.weight", "2.bias"])


def test_cut_points_that_are_not_there_are_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    trained = [name for name, _ in net.named_parameters()]
    with pytest.raises(ConfigError, match=r"cut_points: '7' is no submodule of Sequential. There are 0, 1, 2"):
        check_split(net, 2, ["7"], trained)
    with pytest.raises(ConfigError, match=r"make 3 pipeline stages, but there are to be 2. Name 1 submodules"):
        check_split(net, 2, ["1", "2"], trained)
    check_split(net, 2, ["1"], trained)


def test_stages_without_anything_to_train_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the stage before 'embedding' has nothing to train"):
        split_module(Net(), (X,), 2, ["embedding"])
    with pytest.raises(ConfigError, match=r"the stage from 'layers.0' on has nothing to train|before 'layers.0'"):
        split_module(Net(), (X,), 3, ["head", "layers.0"])
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(ConfigError, match="the stage from '2' on has nothing to train"):
        split_module(net, (X,), 2, ["2"])


def test_what_cannot_be_looked_into_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'layers.1' cannot be looked into, so that no stage can begin with"):
        split_module(Net(odd=True), (X,), 2, ["layers.1.inner.2"])
    net = nn.Sequential(DataDependent(5))
    with pytest.raises(ConfigError, match=r"no more than 1 can be cut apart; '0' \(DataDependent\) cannot"):
        split_module(net, (X,), 2)
    with pytest.raises(ConfigError, match=r"the forward of DataDependent cannot be traced .* cannot be exported"):
        split_module(DataDependent(5), (X,), 2)


def test_layers_that_share_weights_stay_in_one_stage() -> None:
    shared = nn.Linear(5, 5)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(5, 5))
    cut = split_module(net, (X,), 2)
    assert [len(names) for names in parameters_of(cut)] == [2, 2]
    with pytest.raises(ConfigError, match="no stage can begin with '1': both sides use the same parameters"):
        split_module(net, (X,), 2, ["1"])


def test_a_submodule_that_is_not_called_begins_no_stage() -> None:
    net = Net()
    net.spare = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no stage can begin with 'spare', which the forward does not call"):
        split_module(net, (X,), 2, ["spare"])


def test_a_forward_that_looks_at_types_is_not_trusted_blindly() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden * 2 if isinstance(hidden, Tensor) else hidden)  # a proxy is none

    net = Typed()
    cut = split_module(net, (X,), 2)
    assert torch.allclose(run(cut, (X,)), net(X), atol=1e-6), "torch.export knows better"
