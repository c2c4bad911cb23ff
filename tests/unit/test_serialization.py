"""Modules on disk: what goes out comes back equal, and nothing that a file says is executed."""

import collections
import copy
import enum
import importlib
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkdl import serialization
from sparkdl.errors import PersistenceError
from sparkdl.serialization import (
    allow_modules,
    describe_module,
    dump_weights,
    load_weights,
    resolve_function,
    restore_module,
)

ROWS = 4
Make = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights that differ from layer to layer and not from run to run; and no package trusted from another test."""
    monkeypatch.setattr(serialization, "_allowed", set())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def on_disk(module: nn.Module) -> tuple[dict[str, Any], bytes]:
    """What is written of a module: JSON that any reader takes, and safetensors."""
    text = json.dumps(describe_module(module), allow_nan=False)
    return json.loads(text), dump_weights(module)


def round_trip(module: nn.Module) -> nn.Module:
    return restore_module(*on_disk(module))


def flat(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for entry in (value or ()) for tensor in flat(entry)]


# ---- modules of the tests --------------------------------------------------------------------------------------------
class Tied(nn.Module):
    """The weights of the embedding are those of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


class Repeated(nn.Module):
    """One layer under two names, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.layers = nn.ModuleList([self.first, nn.Linear(5, 5), self.first])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, *self.layers):
            x = layer(x).tanh()
        return x


class Plain(nn.Module):
    """Every kind of plain attribute, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_parameter("absent", None)
        self.register_buffer("mean", torch.arange(5.0))
        self.register_buffer("table", torch.arange(5.0) * 3, persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))
        self.activation = F.gelu
        self.layer_class = nn.Linear
        self.name, self.count, self.rate, self.flag, self.nothing = "Zürich", 2**60, 0.1, True, None
        self.bounds, self.whole = (-math.inf, math.inf), math.nan
        self.shape, self.sizes, self.names = (1, (2, 3)), [1, [2, 3], []], {"only"}
        self.settings = {"depth": {"a": 1}, "dtype": torch.float64, "device": torch.device("cpu"), "float": 1.0}
        self.one_key = {"import": "os:system"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation((x - self.mean) * self.scale) + self.table * self.frozen
        return x.masked_fill(self.mask, 0.0).clamp(*self.bounds)


class Parts(nn.Module):
    """Lists and dicts of parameters and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(5)), "scale": nn.Parameter(torch.randn(5))})
        self.branches = nn.ModuleDict({"left": nn.Linear(5, 5), "right": nn.Sequential(nn.Linear(5, 5), nn.ReLU())})
        self.optional: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x * weight
        x = x * self.named["scale"] + self.named["bias"]
        return torch.stack([self.branches[name](x) for name in self.branches]).sum(0)


class Outer:
    """A class that holds a module class."""

    class Inner(nn.Linear):
        pass


class Locked(nn.Linear):
    """Keeps a lock, which cannot travel, and makes a new one on arrival."""

    def __init__(self) -> None:
        super().__init__(5, 2)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


class Loud(nn.Linear):
    """Its constructor must not run on loading."""

    made = 0

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        Loud.made += 1


class Holder(nn.Module):
    """Holds anything as an attribute."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing


class Extra(nn.Linear):
    """Keeps state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("nothing was stored")


def materialised() -> nn.Module:
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))
    module(torch.randn(ROWS, 5))
    return module


def trained() -> nn.Module:
    """Batch statistics that are not those of a new module, in training mode."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(4), nn.Flatten())
    for _ in range(3):
        module(torch.randn(ROWS, 3, 6, 6))
    return module


def half_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    module[0].requires_grad_(False).eval()
    return module


def numbers() -> tuple[Tensor, ...]:
    return (torch.randn(ROWS, 5),)


def images() -> tuple[Tensor, ...]:
    return (torch.randn(ROWS, 3, 6, 6),)


def words() -> tuple[Tensor, ...]:
    return (torch.randint(0, 11, (ROWS, 7)),)


def sequences() -> tuple[Tensor, ...]:
    return (torch.randn(7, ROWS, 8),)


MODULES: dict[str, tuple[Make, Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(5, 3), numbers),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU("tanh"), nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 3)),
        numbers,
    ),
    "named sequence": (
        lambda: nn.Sequential(collections.OrderedDict(z=nn.Linear(5, 5), a=nn.ReLU6(), m=nn.Linear(5, 2))),
        numbers,
    ),
    "activations": (
        lambda: nn.Sequential(nn.Hardtanh(-1, 2), nn.PReLU(), nn.Softplus(2.0), nn.LeakyReLU(0.3), nn.Softmax(1)),
        numbers,
    ),
    "convolution in training": (trained, images),
    "grouped and transposed convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, (3, 1), 2, (1, 0), groups=3, bias=False),
            nn.GroupNorm(2, 6),
            nn.MaxPool2d(2),
            nn.ConvTranspose2d(6, 2, 2, output_padding=1, stride=2),
            nn.AdaptiveAvgPool2d((1, 2)),
            nn.Flatten(1),
        ),
        images,
    ),
    "lstm": (lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, dropout=0.1), sequences),
    "lstm with projections": (lambda: nn.LSTM(8, 6, proj_size=3), sequences),
    "gru": (lambda: nn.GRU(8, 6, batch_first=True, bias=False), sequences),
    "rnn": (lambda: nn.RNN(8, 6, nonlinearity="relu"), sequences),
    "transformer encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 2, enable_nested_tensor=False
        ),
        sequences,
    ),
    "transformer encoder with relu": (lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), sequences),
    "transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        lambda: (*sequences(), *sequences()),
    ),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8, add_bias_kv=True),
        lambda: tuple(sequences()[0] for _ in range(3)),
    ),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=2, max_norm=1.0), words),
    "embedding bag": (lambda: nn.EmbeddingBag(11, 6, mode="sum"), words),
    "bilinear": (lambda: nn.Bilinear(5, 5, 2), lambda: (*numbers(), *numbers())),
    "materialised lazy modules": (materialised, numbers),
    "tied weights": (Tied, words),
    "a module under several names": (Repeated, numbers),
    "plain attributes and non-persistent buffers": (Plain, numbers),
    "lists and dicts of parameters and modules": (Parts, numbers),
    "nested class": (lambda: Outer.Inner(5, 2), numbers),
    "lock": (Locked, numbers),
    "half frozen doubles": (half_frozen, lambda: (numbers()[0].double(),)),
    "bfloat16": (lambda: nn.Linear(5, 2).bfloat16(), lambda: (numbers()[0].bfloat16(),)),
}


# ---- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", MODULES)
def test_round_trip_computes_the_same(name: str) -> None:
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    restored = round_trip(module)
    for eager, again in ((module, restored), (module.eval(), restored.eval())):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(5)
            expected = flat(eager(*given))
            torch.manual_seed(5)
            found = flat(again(*given))
        assert expected
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_round_trip_keeps_structure_state_and_modes(name: str) -> None:
    module = MODULES[name][0]()
    restored = round_trip(module)
    assert repr(restored) == repr(module)
    assert [type(part) for part in restored.modules()] == [type(part) for part in module.modules()]
    assert [part.training for part in restored.modules()] == [part.training for part in module.modules()]
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        options = {"remove_duplicate": False}
        assert [n for n, _ in getattr(restored, kind)(**options)] == [n for n, _ in getattr(module, kind)(**options)]
        assert len(list(getattr(restored, kind)())) == len(list(getattr(module, kind)())), "what was shared still is"
    assert list(restored.state_dict()) == list(module.state_dict())
    pairs = zip(
        [*restored.named_parameters(), *restored.named_buffers()],
        [*module.named_parameters(), *module.named_buffers()], strict=True,
    )  # fmt: skip
    for (_, found), (path, expected) in pairs:
        assert torch.equal(found, expected), path
        assert (found.dtype, found.requires_grad, type(found)) == (
            expected.dtype,
            expected.requires_grad,
            type(expected),
        )


@pytest.mark.parametrize("name", MODULES)
def test_what_was_restored_can_be_trained_and_stored_again(name: str) -> None:
    module = MODULES[name][0]()
    restored = round_trip(module)
    assert on_disk(restored) == on_disk(module)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for value in restored.parameters():
            value.add_(1)
    assert all(torch.equal(module.state_dict()[path], value) for path, value in before.items())


def test_plain_attributes_come_back_with_their_types() -> None:
    module = Plain()
    restored = round_trip(module)
    for name in (
        "name",
        "count",
        "rate",
        "flag",
        "nothing",
        "bounds",
        "shape",
        "sizes",
        "names",
        "settings",
        "one_key",
    ):
        found, expected = getattr(restored, name), getattr(module, name)
        assert found == expected
        assert type(found) is type(expected)
    assert math.isnan(restored.whole)  # type: ignore[arg-type]
    assert restored.activation is F.gelu
    assert restored.layer_class is nn.Linear
    assert restored.absent is None
    assert restored.later is None


def test_loss_modules_travel_too() -> None:
    loss = round_trip(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]), label_smoothing=0.1, ignore_index=1))
    assert isinstance(loss, nn.CrossEntropyLoss)
    assert loss.weight is not None
    assert (loss.weight.tolist(), loss.label_smoothing, loss.ignore_index) == ([1, 2, 4], 0.1, 1)


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    big = nn.Embedding(1000, 64)
    tied = nn.Sequential(big, nn.Linear(64, 1000, bias=False))
    tied[1].weight = big.weight
    assert len(dump_weights(tied)) < len(dump_weights(big)) + 1000
    restored: Any = round_trip(tied)
    assert restored[1].weight is restored[0].weight


def test_no_constructor_runs_and_no_random_number_is_drawn_on_loading() -> None:
    written = on_disk(Loud(3))
    made, state = Loud.made, torch.get_rng_state()
    assert isinstance(restore_module(*written), Loud)
    assert Loud.made == made
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_can_be_given_to_a_module_of_ones_own() -> None:
    source, target = Plain(), Plain()
    with torch.no_grad():
        source.scale.fill_(7)
        source.get_buffer("table").fill_(8)
    load_weights(target, dump_weights(source))
    assert float(target.scale.detach()) == 7
    assert target.table.tolist() == [8] * 5


@pytest.mark.parametrize("function", [torch.relu, torch.tanh, torch.sigmoid, torch.nn.functional.silu, F.softplus])
def test_torchs_own_functions_can_be_attributes(function: Any) -> None:
    assert round_trip(Holder(function)).thing is function


# ---- what cannot be described ----------------------------------------------------------------------------------------
def test_a_class_defined_in_a_function_is_refused_with_its_place_and_the_way_out() -> None:
    class Here(nn.Linear):
        pass

    with pytest.raises(
        PersistenceError,
        match=r'Sequential\.1: the class .*Here cannot be imported by its name .*Move it .*"allowPickle"',
    ):
        describe_module(nn.Sequential(nn.ReLU(), Here(1, 1)))


def test_a_class_of_the_main_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Script(nn.Linear):
        pass

    Script.__module__, Script.__qualname__ = "__main__", "Script"
    monkeypatch.setattr(sys.modules["__main__"], "Script", Script, raising=False)
    with pytest.raises(PersistenceError, match=r"class Script cannot be imported by its name .*notebook, a script"):
        describe_module(Script(1, 1))


def test_a_class_whose_name_means_another_by_now_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Loud(1)
    monkeypatch.setattr(sys.modules[__name__], "Loud", nn.Linear)
    with pytest.raises(PersistenceError, match="class Loud cannot be imported by its name"):
        describe_module(module)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_are_refused(register: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    getattr(module[0], register)(lambda *arguments: None)
    with pytest.raises(
        PersistenceError, match=r"Sequential\.0: hooks \(\w+\) are code and cannot be described\. Remove"
    ):
        describe_module(module)


class Pair(NamedTuple):
    left: int
    right: int


class Mode(enum.IntEnum):
    FAST = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "thing",
    [
        lambda x: x,
        torch.zeros(3),
        {1: "a"},
        b"bytes",
        1j,
        range(3),
        Path("somewhere"),
        threading.Lock(),
        [nn.Linear(1, 1)],
        len.__call__,
        Pair(1, 2),
        Mode.FAST,
        Text("a"),
        collections.OrderedDict(a=1),
        collections.defaultdict(int),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_attributes_that_would_not_come_back_as_they_are_are_refused_with_their_place(thing: Any) -> None:
    with pytest.raises(PersistenceError, match=r"Sequential\.0\.thing is a .*no plain value and cannot be described"):
        describe_module(nn.Sequential(Holder(thing)))


def test_state_that_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(PersistenceError, match=r"Extra keeps '_extra_state', a dict, in its state; only tensors are"):
        dump_weights(Extra(2, 2))


def test_a_lazy_module_without_shapes_is_refused_with_the_way_out() -> None:
    with pytest.raises(PersistenceError, match=r'Sequential\.0: LazyLinear has no shapes yet\. Run .*"allowPickle"'):
        describe_module(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
        lambda: torch.fx.symbolic_trace(nn.Linear(2, 2)),
    ],
    ids=["weight_norm", "spectral_norm", "fx"],
)
def test_modules_whose_class_was_made_on_the_fly_are_refused(make: Make) -> None:
    with pytest.raises(PersistenceError, match="cannot be imported by its name"):
        describe_module(make())


# ---- classes that may be loaded --------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that can be imported, and that leaves a trace when it is."""
    root = tmp_path / "strange_layers"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "layers.py").write_text(
        "import os, pathlib\n"
        "import torch\n"
        "from torch import nn\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "class Layer(nn.Linear):\n"
        "    pass\n"
        "def twice(x):\n"
        "    return 2 * x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "strange_layers"]:
        del sys.modules[name]


def of_package(package: Path) -> tuple[dict[str, Any], bytes]:
    """What was written of a module of the package by a process that knew it."""
    layers = importlib.import_module("strange_layers.layers")
    module = layers.Layer(2, 2)
    module.activation = layers.twice
    written = on_disk(module)
    for name in ("strange_layers", "strange_layers.layers"):
        del sys.modules[name]
    (package / "imported").unlink()
    return written


def test_a_class_that_is_not_imported_is_refused_and_not_imported(package: Path) -> None:
    written = of_package(package)
    with pytest.raises(
        PersistenceError,
        match=r"asks for strange_layers\.layers:Layer, which is in none of the trusted packages \(torch\.nn\)\. If you "
        r"trust it, `import strange_layers\.layers` before loading, or call sparkdl\.allow_modules\('strange_layers'\)",
    ):
        restore_module(*written)
    assert not (package / "imported").exists()
    assert "strange_layers.layers" not in sys.modules


@pytest.mark.parametrize("how", ["allow_modules", "argument"])
def test_a_class_of_an_allowed_package_is_imported_on_loading(package: Path, how: str) -> None:
    written = of_package(package)
    if how == "allow_modules":
        allow_modules("strange_layers")
    restored: Any = restore_module(*written, allowed=() if how == "allow_modules" else ("strange_layers",))
    assert type(restored).__module__ == "strange_layers.layers"
    assert restored.activation(3) == 6
    assert (package / "imported").exists()


def test_a_class_of_an_imported_module_is_loaded_but_its_functions_are_not_called_unasked(package: Path) -> None:
    description, weights = of_package(package)
    importlib.import_module("strange_layers.layers")
    with pytest.raises(
        PersistenceError, match=r"function strange_layers\.layers:twice, .*allow_modules\('strange_layers'\)"
    ):
        restore_module(description, weights)
    del description["attributes"]["activation"]
    assert type(restore_module(description, weights)).__name__ == "Layer"


def test_a_name_that_begins_like_a_trusted_package_is_not_trusted(package: Path) -> None:
    written = of_package(package)
    allow_modules("strange")
    with pytest.raises(PersistenceError, match="in none of the trusted packages"):
        restore_module(*written)


def test_a_class_that_is_gone_is_named() -> None:
    description, weights = on_disk(Loud(2))
    description["class"] = f"{__name__}:Gone"
    with pytest.raises(PersistenceError, match=rf"asks for {__name__}:Gone, which does not exist here"):
        restore_module(description, weights)


# ---- doctored files --------------------------------------------------------------------------------------------------
@pytest.fixture
def victim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], bytes]]:
    """A file to be doctored. Nothing may be called, imported or hooked while it is read."""
    written = on_disk(nn.TransformerEncoderLayer(4, 2, 8))
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    hooks = nn.modules.module
    names = [name for name in vars(hooks) if name.startswith("_global_") and isinstance(getattr(hooks, name), dict)]
    assert names
    before = {name: dict(getattr(hooks, name)) for name in names}
    yield written
    after = {name: dict(getattr(hooks, name)) for name in names}
    for name in names:  # whatever happened, the other tests shall not suffer
        getattr(hooks, name).clear()
        getattr(hooks, name).update(before[name])
    assert after == before
    assert set(sys.modules) == modules
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path",
    [
        "os:system", "os:mkdir", "posix:mkdir", "builtins:eval", "builtins:exec", "builtins:dict", "subprocess:Popen",
        "torch:load", "torch.nn:Parameter", "torch.nn.modules.module:Module.register_forward_hook", "torch.nn:missing",
        "torch.nn:", ":", "", "antigravity:fly", "torch.nn.modules.linear:torch.nn.Linear", "torch.nn.functional:relu",
        "torch.nn.modules.linear:math.os.mkdir",
    ],
)  # fmt: skip
def test_a_doctored_class_is_refused_and_nothing_runs(victim: tuple[dict[str, Any], bytes], path: str) -> None:
    description, weights = victim
    description["class"] = path
    with pytest.raises(PersistenceError, match=r"The file|description"):
        restore_module(description, weights)
    description["class"] = "torch.nn.modules.container:Sequential"
    description["children"]["self_attn"]["class"] = path
    with pytest.raises(PersistenceError, match=r"The file|description"):
        restore_module(description, weights)


@pytest.mark.parametrize(
    "value",
    [
        {"import": "os:system"},
        {"import": "os:mkdir"},
        {"import": "builtins:eval"},
        {"import": "torch:load"},
        {"import": "torch.hub:load"},
        {"import": "torch.nn.functional:torch.os.system"},
        {"import": "torch.nn.functional:importlib.import_module"},
        {"import": "torch.nn.functional:torch.load"},
        {"import": "torch.nn.functional:relu.__globals__"},
        {"import": "torch.nn.functional:relu.__code__"},
        {"import": "torch.nn.modules.module:register_module_forward_hook"},
        {"import": "antigravity:fly"},
        {"dtype": "load"},
        {"dtype": "os"},
        {"dtype": "compile"},
        {"call": "os:system"},
        {"pickle": "gASVIQAAAAAAAACMBXBvc2l4lIwFbWtkaXKUk5SMBXRyYWNllIWUUpQu"},
        {"tuple": [{"import": "os:system"}]},
        {"dict": {"a": {"set": [{"import": "os:system"}]}}},
        [{"import": "os:system"}],
    ],
    ids=json.dumps,
)
def test_a_doctored_attribute_is_refused_and_nothing_runs(victim: tuple[dict[str, Any], bytes], value: Any) -> None:
    description, weights = victim
    description["attributes"]["activation"] = value
    with pytest.raises(PersistenceError, match=r"The file (asks for|holds an attribute of unknown kind)"):
        restore_module(description, weights)


@pytest.mark.parametrize(
    "method",
    ["load_state_dict", "forward", "__call__", "_call_impl", "state_dict", "named_buffers", "eval", "train", "to"],
)
def test_a_doctored_file_cannot_replace_a_method(victim: tuple[dict[str, Any], bytes], method: str) -> None:
    description, weights = victim
    description["attributes"][method] = {"import": "torch.nn.functional:relu"}
    with pytest.raises(PersistenceError, match=rf"{method}"):
        restore_module(description, weights)


@pytest.mark.parametrize("name", sorted(name for name in vars(nn.Module()) if "hook" in name))
def test_a_doctored_file_cannot_bring_hooks(victim: tuple[dict[str, Any], bytes], name: str) -> None:
    description, weights = victim
    description["attributes"][name] = {"dict": {"0": {"import": "torch.nn.functional:relu"}}}
    try:
        restored = restore_module(description, weights)
    except PersistenceError:
        return
    assert not getattr(restored, name)


@pytest.mark.parametrize("dtype", ["load", "os", "Tensor", "float99", 3, None])
def test_a_doctored_dtype_of_a_weight_is_refused(victim: tuple[dict[str, Any], bytes], dtype: Any) -> None:
    description, weights = victim
    description["children"]["linear1"]["parameters"]["weight"]["dtype"] = dtype
    with pytest.raises(PersistenceError, match=r"dtype|damaged"):
        restore_module(description, weights)


def damage(description: dict[str, Any], how: str) -> None:
    attributes = description["attributes"]
    match how:
        case "two keys":
            attributes["activation"] = {"tuple": [], "set": []}
        case "no key":
            attributes["activation"] = {}
        case "unknown tensor":
            attributes["activation"] = {"tensor": "nobody"}
        case "unknown device":
            attributes["activation"] = {"device": "zz"}
        case "no float":
            attributes["activation"] = {"float": "much"}
        case "unknown part":
            description["children"]["linear1"] = {"same": 99}
        case "missing class":
            del description["class"]
        case "missing attributes":
            del description["children"]["linear1"]["attributes"]
        case "list for dict":
            description["parameters"] = []
        case "number for path":
            description["class"] = 3
        case "negative shape":
            description["children"]["linear1"]["parameters"]["weight"]["shape"] = [-1]
        case "number for child":
            description["children"]["linear1"] = 3


@pytest.mark.parametrize(
    "how",
    ["two keys", "no key", "unknown tensor", "unknown device", "no float", "unknown part", "missing class",
     "missing attributes", "list for dict", "number for path", "negative shape", "number for child"],
)  # fmt: skip
def test_a_damaged_description_is_refused(victim: tuple[dict[str, Any], bytes], how: str) -> None:
    description, weights = victim
    damage(description, how)
    with pytest.raises(PersistenceError, match="description of the module is damaged"):
        restore_module(description, weights)


@pytest.mark.parametrize("cut", [0, 1, 8, 50, -1, -100])
def test_damaged_weights_are_refused(cut: int) -> None:
    weights = dump_weights(nn.Linear(5, 3))
    with pytest.raises(PersistenceError, match=r"weights cannot be read: .*Was the save completed\?"):
        load_weights(nn.Linear(5, 3), weights[:cut])


@pytest.mark.parametrize(
    "other", [nn.Linear(4, 3), nn.Linear(5, 3, bias=False), nn.Bilinear(5, 5, 3), nn.ReLU(), Plain()]
)
def test_weights_of_another_module_are_refused(other: nn.Module) -> None:
    with pytest.raises(PersistenceError, match="weights do not fit the module Linear"):
        load_weights(nn.Linear(5, 3), dump_weights(other))
    with pytest.raises(PersistenceError, match=f"weights do not fit the module {type(other).__name__}"):
        load_weights(other, dump_weights(nn.Linear(5, 3)))


def test_a_non_persistent_buffer_of_another_shape_is_refused() -> None:
    small = Plain()
    small.table = torch.ones(1)
    with pytest.raises(PersistenceError, match="weights do not fit the module Plain"):
        load_weights(Plain(), dump_weights(small))


def test_functions_are_trusted_by_package_and_not_because_they_are_imported(package: Path) -> None:
    assert resolve_function("torch.nn.functional:relu") is F.relu
    assert resolve_function("torch._C._nn:gelu") is F.gelu
    for path in ("os:system", "builtins:eval", "sparkdl.errors:ConfigError", f"{__name__}:damage"):
        with pytest.raises(PersistenceError, match=rf"function {path}, which is in none of the trusted packages"):
            resolve_function(path)
    allow_modules("strange_layers")
    assert resolve_function("strange_layers.layers:twice")(3) == 6
    for path in ("strange_layers.layers:os.system", "strange_layers.layers:torch.load"):
        with pytest.raises(PersistenceError, match="which is not defined there"):
            resolve_function(path)
