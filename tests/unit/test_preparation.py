"""What is done to a module before it is trained."""

import logging
import shutil

import pytest
import torch
from torch import Tensor, nn

from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.preparation import check_preparation, compile_module, freeze_parameters, prepare_module

# Deprecated in torch, and used by torch.compile.
COMPILES = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
INPUTS = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))


def gradients(module: nn.Module) -> list[Tensor]:
    module.zero_grad()
    module(INPUTS).square().sum().backward()
    return [value.grad.clone() for value in module.parameters() if value.grad is not None]


@COMPILES
def test_a_compiled_module_gives_the_same_gradients_under_the_same_names() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    module = mlp()
    expected = gradients(module)
    assert compile_module(module, lambda: gradients(module))
    for found, wanted in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert set(module.state_dict()) == set(mlp().state_dict())


def test_a_module_that_cannot_be_compiled_is_trained_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module = mlp()
    expected = gradients(module)

    def fail() -> None:
        raise RuntimeError("no working C++ compiler\nand many lines more")

    with caplog.at_level(logging.WARNING):
        assert not compile_module(module, fail)
    assert caplog.messages == [
        "torchCompile=True, but torch.compile failed on this module: RuntimeError: no working C++ compiler. The rank "
        "goes on without it."
    ]
    for found, wanted in zip(gradients(module), expected, strict=True):
        assert torch.equal(found, wanted)


def test_recomputed_parts_keep_their_names_and_gradients() -> None:
    module, plain = mlp(), mlp()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    module[0].register_forward_hook(count)
    prepare_module(module, TrainConfig(activation_checkpointing=("0", "1")))
    for found, wanted in zip(gradients(module), gradients(plain), strict=True):
        assert torch.equal(found, wanted)
    assert set(module.state_dict()) == set(plain.state_dict())
    assert calls == 1, "the layer is computed again inside of its call"


def test_batch_norm_layers_are_replaced_with_the_same_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4, momentum=0.3)))
    layer = module[1][0]  # type: ignore[index]
    before = layer.weight
    prepared = prepare_module(module, TrainConfig(sync_batch_norm=True))
    (found,) = (part for part in prepared.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    assert type(found).__name__ == "SyncBatchNorm"
    assert found.weight is before
    assert found.momentum == 0.3
    assert torch.equal(found.eval()(torch.ones(2, 4)), layer.eval()(torch.ones(2, 4)))


def test_frozen_parameters_can_be_thawed() -> None:
    module = mlp()
    frozen = freeze_parameters(module, ["^0", "bias"])
    assert [name for name, value in module.named_parameters() if value.requires_grad] == ["2.weight"]
    for value in frozen:
        value.requires_grad_(True)
    assert all(value.requires_grad for value in module.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frozen_parameters": ("0", "2")}, "leave no parameter of Sequential to train"),
        ({"frozen_parameters": ("7",)}, r"frozenParameters: '7' matches no parameter. There are 0.weight, 0.bias, "),
        ({"frozen_parameters": ("*",)}, "is no regular expression"),
        ({"activation_checkpointing": ("7",)}, "activationCheckpointing: '7' matches no submodule. There are 0, 1, 2."),
        ({"sync_batch_norm": True}, "has no BatchNorm layer"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_preparation(mlp(), TrainConfig(**settings))  # type: ignore[arg-type]
