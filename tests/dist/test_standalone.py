"""Training without Spark: in this process, and in processes that torchrun starts."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.callbacks import Callback, RunView
from sparkdl.checkpoint import Preempted
from sparkdl.config import TrainConfig
from sparkdl.errors import CallbackError, ConfigError, DataError
from sparkdl.io.in_memory import open_rows
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.schedule import SchedulerRecipe
from sparkdl.standalone import FitResult, TensorRows, fit_module, process_group_from_environment
from tests.dist.conftest import ROOT, Torchrun

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

FOLDER = "SPARKDL_TEST_STANDALONE"
CONFIG = TrainConfig(max_epochs=3, batch_size=16, num_shards=2, device="cpu", seed=5)


def rows_of(seed: int, rows: int = 100) -> TensorRows:
    """Random rows in float64, whose label is a class number."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 3, generator=random, dtype=torch.float64)
    return TensorRows(features, (features.sum(1) > 0).long() + (features[:, 0] > 1).long())


def mlp() -> nn.Module:
    """A row-wise module in float64."""
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def noisy() -> nn.Module:
    """A module that draws random numbers and keeps running means."""
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3)).double()


def fit(config: TrainConfig = CONFIG, **settings: Any) -> FitResult:
    """One fit, with defaults that a test does not care about."""
    given = {"module": mlp, "rows": rows_of(1), "loss": "cross_entropy", "learning_rate": 0.01, "config": config}
    return fit_module(**{**given, **settings})


def weights_of(result: FitResult) -> dict[str, Tensor]:
    return result.module.state_dict()


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name] - value).double().norm()
        assert float(difference) <= tolerance * float(value.double().norm()), name


class FailAt(Callback):
    """Does something after some step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, run: RunView) -> None:
        if run.step == self.step:
            self.action()


def fail() -> None:
    raise RuntimeError("stopped by the test")


# ---- one process -----------------------------------------------------------------------------------------------------
def test_a_fit_is_a_plain_loop_over_the_batches():
    result = fit(validation=rows_of(2, 31), metrics=["accuracy"], optimizer="sgd", learning_rate=0.1)
    torch.manual_seed(CONFIG.seed)
    module = mlp()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    data = open_rows(rows_of(1), CONFIG, rank=0, world_size=1)
    held = rows_of(2, 31).batch
    for epoch, record in enumerate(result.history):
        total = 0.0
        with data.open_epoch(epoch) as batches:
            for batch in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(batch.inputs[0]), batch.labels[0])
                loss.backward()
                optimizer.step()
                total += loss.item() * batch.rows
        with torch.no_grad():
            outputs = module(held.inputs[0])
        assert record["loss"] == pytest.approx(total / 100, rel=1e-9)
        expected = nn.functional.cross_entropy(outputs, held.labels[0]).item()
        assert record["validation_loss"] == pytest.approx(expected, rel=1e-9)
        assert record["validation_accuracy"] == pytest.approx((outputs.argmax(1) == held.labels[0]).double().mean())
        assert (record["epoch"], record["step"], record["rows"]) == (epoch + 1, 7 * (epoch + 1), 100)
    assert len(result.history) == 3
    assert_equal(weights_of(result), module.state_dict(), 1e-12)


def test_a_fit_leaves_the_callers_module_and_random_numbers_as_they_were():
    torch.manual_seed(9)
    module = noisy().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    result = fit(module=module)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert_equal(module.state_dict(), before)
    assert not module.training
    assert result.module is not module
    assert not result.module.training
    assert not torch.equal(result.module[0].weight, module[0].weight)
    assert not dist.is_initialized()


def test_a_fit_with_random_layers_repeats_itself():
    assert_equal(weights_of(fit(module=noisy)), weights_of(fit(module=noisy)))


def test_what_is_done_to_a_module_for_its_training_stays_out_of_the_result():
    config = replace(
        CONFIG, frozen_parameters=("^0.weight",), activation_checkpointing=("3",), sync_batch_norm=True, averaging="ema"
    )
    result = fit(config, module=noisy)
    torch.manual_seed(CONFIG.seed)
    start = noisy()
    assert torch.equal(result.module[0].weight, start[0].weight), "a frozen parameter was trained"
    assert not torch.equal(result.module[3].weight, start[3].weight)
    assert all(value.requires_grad for value in result.module.parameters())
    assert type(result.module[1]) is nn.BatchNorm1d
    assert "forward" not in vars(result.module[3])


def test_steps_of_the_users_own_see_tensors_by_name():
    rows = rows_of(1)
    named = TensorRows({"left": rows.inputs[:, :1], "right": rows.inputs[:, 1:]}, {"kind": rows.labels})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.inner(torch.cat([left, right], 1))

    def predict(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module(right=batch["right"], left=batch["left"])

    def step(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = predict(module, batch)
        right = (outputs.argmax(1) == batch["kind"]).double()
        return {"loss": nn.functional.cross_entropy(outputs, batch["kind"]), "right": right}

    settings = {"module": Two, "rows": named, "loss": None, "validation": named, "metrics": ["accuracy"]}
    result = fit(training_step=step, prediction_step=predict, **settings)
    assert_equal({f"inner.{name}": value for name, value in weights_of(fit()).items()}, weights_of(result), 1e-9)
    record = result.history[-1]
    assert record["validation_accuracy"] == pytest.approx(record["validation_right"])
    assert 0 < record["right"] <= 1


def test_recipes_are_taken_as_they_are():
    recipe = OptimizerRecipe("sgd", 0.1, {"momentum": 0.9}, weight_decay=0.1)
    schedule = SchedulerRecipe("step", {"step_size": 1, "gamma": 0.5})
    history = fit(optimizer=recipe, learning_rate=None, scheduler=schedule).history
    assert [record["learning_rate"] for record in history] == pytest.approx([0.1, 0.05, 0.025])
    assert fit(scheduler="cosineannealing").history[-1]["learning_rate"] == pytest.approx(0.0025)


def test_epochs_are_logged_and_told(caplog: pytest.LogCaptureFixture):
    events: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO, logger="sparkdl.standalone"):
        result = fit(on_event=events.append)
        fit(replace(CONFIG, verbose=False))
    lines = [record.message for record in caplog.records if record.name == "sparkdl.standalone"]
    assert [line.partition(",")[0].partition(";")[0] for line in lines] == [
        f"epoch {number} of 3: loss {record['loss']:.4g}" for number, record in enumerate(result.history, 1)
    ]
    told = [event for event in events if event["event"] != "step"]
    assert [event["event"] for event in told] == ["plan", "epoch", "epoch", "epoch"]
    assert told[0] | {"threads": 0} == {
        "event": "plan", "epochs": 3, "steps": 7, "rows": 100, "shards": 2, "cache": "tensors in memory",
        "batch_size": 16, "world_size": 1, "device": "cpu", "threads": 0, "resumed": 0,
    }  # fmt: skip
    assert [{**record, "event": "epoch"} for record in result.history] == told[1:]


def test_the_best_epoch_is_told_and_its_weights_returned():
    config = replace(CONFIG, max_epochs=6, restore_best=True, early_stopping_patience=2)
    result = fit(config, validation=rows_of(2, 20), optimizer="sgd", learning_rate=3.0)
    losses = [record["validation_loss"] for record in result.history]
    assert result.best_epoch == losses.index(min(losses)) + 1
    held = rows_of(2, 20).batch
    with torch.no_grad():
        found = nn.functional.cross_entropy(result.module(held.inputs[0]), held.labels[0])
    assert float(found) == pytest.approx(min(losses), rel=1e-6)


# ---- failures of one process -----------------------------------------------------------------------------------------
def test_a_callback_that_raises_is_named_and_the_next_fit_works():
    with pytest.raises(CallbackError, match="FailAt failed in on_step_end, on rank 0 after step 4"):
        fit(callbacks=[FailAt(4, fail)])
    assert not dist.is_initialized()
    assert len(fit().history) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": replace(CONFIG, validation_fraction=0.1)}, "validation_fraction=0.1 has no effect"),
        ({"config": replace(CONFIG, staging_dir="/tmp")}, "staging_dir='/tmp' has no effect on rows in memory"),
        ({"config": replace(CONFIG, max_restarts=5)}, "torchrun --max-restarts"),
        ({"config": replace(CONFIG, num_train_workers=2)}, "num_train_workers=2, but there are 1 processes"),
        ({"config": replace(CONFIG, batch_size=0)}, "batchSize=0 is too small"),
        ({"resume": True}, "resume=True needs checkpoint_dir"),
        ({"optimizer": OptimizerRecipe(), "learning_rate": 0.1}, "learning_rate=0.1 is set beside a recipe"),
        ({"loss": None}, "either a loss or a training_step"),
        ({"training_step": lambda module, batch: 0}, "either a loss or a training_step"),
        ({"module": nn.Linear(4, 3)}, "The module failed on its first forward"),
        ({"callbacks": [Callback]}, "an instance, not the class"),
        ({"metrics": ["exactness"]}, "exactness"),
        ({"config": replace(CONFIG, frozen_parameters=("nothing",))}, "matches no parameter"),
        ({"module": nn.Linear(3, 3).double, "config": replace(CONFIG, sync_batch_norm=True)}, "has no BatchNorm layer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str):
    if settings.get("module") is not None and not isinstance(settings["module"], nn.Module):
        settings["module"] = mlp
    with pytest.raises(ConfigError, match=message):
        fit(**settings)
    assert not dist.is_initialized()


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows to train on"):
        fit(rows=rows_of(1, 0))


def test_a_group_inside_of_a_group_is_refused():
    with process_group_from_environment("cpu") as device:
        assert device == torch.device("cpu")
        assert dist.get_world_size() == 1
        with pytest.raises(ConfigError, match="process group is up already"), process_group_from_environment("cpu"):
            pass
        assert len(fit().history) == 3
        assert dist.is_initialized()


def test_half_of_torchruns_variables_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="has RANK, but not WORLD_SIZE and LOCAL_RANK and LOCAL_WORLD_SIZE"):
        fit()


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [6, pytest.param(7, marks=pytest.mark.slow), 12])
def test_a_run_that_failed_goes_on_from_its_newest_checkpoint(tmp_path: Path, stop: int):
    config = replace(CONFIG, checkpoint_dir=str(tmp_path / "run"), checkpoint_interval=3)
    whole = fit(module=noisy)
    with pytest.raises(CallbackError):
        fit(config, module=noisy, callbacks=[FailAt(stop, fail)], resume=True)
    events: list[dict[str, Any]] = []
    resumed = fit(config, module=noisy, resume=True, on_event=events.append)
    assert events[0]["resumed"] <= stop
    assert_equal(weights_of(resumed), weights_of(whole))
    assert [record["loss"] for record in resumed.history] == [record["loss"] for record in whole.history]
    done = fit(config, module=noisy, resume=True)
    assert_equal(weights_of(done), weights_of(whole))


def test_a_run_that_was_told_to_stop_saves_what_it_did(tmp_path: Path):
    config = replace(CONFIG, checkpoint_dir=str(tmp_path))
    stop = FailAt(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="the state after step 11 was saved"):
        fit(config, module=noisy, callbacks=[stop])
    assert_equal(weights_of(fit(config, module=noisy, resume=True)), weights_of(fit(module=noisy)))


def test_a_directory_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, checkpoint_dir="run")  # relative: there is one host, or one file system
    fit(config)
    assert (tmp_path / "run" / "latest").is_file()
    with pytest.raises(ConfigError, match=r"holds checkpoints of an earlier run, up to step-0+21"):
        fit(config)
    with pytest.raises(ConfigError, match="must be what they were"):
        fit(replace(config, batch_size=8), resume=True)


def test_a_place_for_checkpoints_that_cannot_be_opened_is_told():
    with pytest.raises(ConfigError, match="unheard-of"):
        fit(replace(CONFIG, checkpoint_dir="unheard-of://bucket/run"))


def test_the_code_of_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "standalone.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/standalone.md", "exec"), scope)
    assert len(blocks) == 3
    assert (tmp_path / "runs" / "first" / "latest").is_file()
    assert len(scope["result"].history) == 4


# ---- in the ranks ----------------------------------------------------------------------------------------------------
def two_ranks() -> dict[str, Any]:
    """Fits in a group that is up already."""
    rank, folder = dist.get_rank(), os.environ[FOLDER]
    found: dict[str, Any] = {}
    for name, module in {"mlp": mlp, "noisy": noisy}.items():
        result = fit(module=module, validation=rows_of(2, 31), metrics=["accuracy"])
        found[name] = {"weights": weights_of(result), "history": [dict(record) for record in result.history]}
    config = replace(CONFIG, checkpoint_dir=folder, checkpoint_interval=5)
    stop = FailAt(12, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
    for attempt in range(2):
        try:
            found["resumed"] = weights_of(fit(config, callbacks=[stop] if attempt == 0 else [], resume=True))
        except Preempted as error:
            found["preempted"] = str(error)
    for name, settings in {
        "rows": {"rows": rows_of(1 + rank)},
        "directory": {"config": config},
        "workers": {"config": replace(CONFIG, num_train_workers=3, num_shards=3)},
        "shards": {"config": replace(CONFIG, num_shards=1)},
    }.items():
        try:
            fit(**settings)
        except ConfigError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(torchrun: Torchrun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("checkpoints")))
        return torchrun(two_ranks, 2)


def test_two_ranks_end_with_the_weights_of_one(ranks: list[dict[str, Any]]):
    alone = fit(validation=rows_of(2, 31), metrics=["accuracy"])
    for rank in ranks:
        assert_equal(rank["mlp"]["weights"], weights_of(alone), 1e-9)
        for found, expected in zip(rank["mlp"]["history"], alone.history, strict=True):
            for name in ("loss", "validation_loss", "validation_accuracy"):
                assert found[name] == pytest.approx(expected[name], rel=1e-9)


def test_both_ranks_end_with_the_same_parameters(ranks: list[dict[str, Any]]):
    for name, _ in noisy().named_parameters():
        assert torch.equal(ranks[0]["noisy"]["weights"][name], ranks[1]["noisy"]["weights"][name])


def test_ranks_stop_together_and_go_on(ranks: list[dict[str, Any]]):
    alone = fit()
    for rank in ranks:
        assert "rank 1 was told to stop" in rank["preempted"]
        assert_equal(rank["resumed"], weights_of(alone), 1e-9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows", "Process 1 has other rows or settings than process 0"),
        ("directory", "holds checkpoints of an earlier run"),
        ("workers", "num_train_workers=3, but there are 2 processes"),
        ("shards", "numTrainWorkers=2 is more than numShards=1"),
    ],
)
def test_what_is_wrong_is_told_on_every_rank(ranks: list[dict[str, Any]], name: str, message: str):
    assert all(message in rank[name] for rank in ranks)
    assert ranks[0][name] == ranks[1][name]


# ---- programs --------------------------------------------------------------------------------------------------------
def run(*command: str, processes: int | None = None) -> str:
    """What a program printed, started by itself or in several processes by torchrun."""
    start = [sys.executable]
    if processes is not None:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*start, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.slow
def test_the_example_gives_one_and_two_processes_the_same_weights(tmp_path: Path):
    example = ["-m", "sparkdl.examples.tabular", "--rows", "4000", "--epochs", "3", "--weights"]
    printed = [run(*example, str(tmp_path / "1")), run(*example, str(tmp_path / "2"), processes=2)]
    one, two = (torch.load(tmp_path / name) for name in ("1", "2"))
    assert_equal(two, one, 1e-5)
    header, *records = printed[0].splitlines()
    assert header.split() == ["epoch", "step", "loss", "validation_loss", "validation_accuracy", "learning_rate"]
    assert len(records) == 3
    assert float(records[-1].split()[2]) < float(records[0].split()[2])
    assert [line.split()[:2] for line in printed[1].splitlines()] == [
        line.split()[:2] for line in printed[0].splitlines()
    ]


SCRIPT = """
import sys
import torch
from torch import nn
from sparkdl.config import TrainConfig
from sparkdl.standalone import TensorRows, fit_module

torch.manual_seed(0)
rows = TensorRows(torch.randn(60, 3), torch.randint(3, (60,)))
for number in range(2):
    config = TrainConfig(max_epochs=1, batch_size=16, num_shards=2, device="cpu", verbose=False)
    result = fit_module(lambda: nn.Linear(3, 3), rows, loss="cross_entropy", config=config)
    sys.stdout.write(f"{number} {result.history[-1]['loss']:.6f}\\n")  # at once: both processes write here
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_a_script_under_torchrun_can_fit_again_and_again(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    alone, together = run(str(script)).split(), run(str(script), processes=2).split()
    assert alone[1] == alone[3]
    assert sorted(together[1::2]) == [alone[1]] * 4
