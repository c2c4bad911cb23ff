"""Estimators and models on disk: what is written, that it comes back, and that no file makes Python run code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pyspark.errors import PySparkException
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import DataFrame, Row, SparkSession
from torch import Tensor, nn

from sparkdl import (
    TorchClassificationModel,
    TorchClassifier,
    TorchEstimator,
    TorchRegressionModel,
    TorchRegressor,
)
from sparkdl.errors import PersistenceError
from tests.spark.modules import TiedNet, absolute_error, make_sgd, make_tied_net

pytestmark = pytest.mark.spark

ROOT = Path(__file__).parents[2]
ALLOW_CONF = "spark.sparkdl.allowPickle"
THRESHOLDS = [0.2, 0.3, 0.5]
FILES = {"metadata", "weights.safetensors"}


def local_net() -> nn.Module:
    """A module of a class that nobody can import."""

    class LocalNet(nn.Linear):
        pass

    return LocalNet(3, 3)


def files_of(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}


def metadata_file(path: Path) -> Path:
    (found,) = (path / "metadata").glob("part-*")
    return found


def metadata_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(metadata_file(path).read_text())
    return found


def doctor(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the metadata on disk, and take away the checksums that would tell."""
    metadata = metadata_of(path)
    change(metadata)
    metadata_file(path).write_text(json.dumps(metadata))
    for checksum in (path / "metadata").glob(".*.crc"):
        checksum.unlink()


def replace_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.with_name(f".{path.name}.crc").unlink(missing_ok=True)


def predictions(model: Any, df: DataFrame) -> list[Row]:
    found = model.transform(df).select("x", "rawPrediction", "probability", "prediction")
    return sorted(found.collect(), key=lambda row: row["x"])


def outputs(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return module(torch.arange(12.0).reshape(4, 3) / 10)


@pytest.fixture(scope="module")
def points(spark: SparkSession) -> DataFrame:
    rows = [(0.1 * id_, float(id_ % 4), -1.0, id_ % 3) for id_ in range(12)]
    return spark.createDataFrame(rows, "x double, y double, z double, label int").coalesce(2)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    classifier = TorchClassifier(
        module=TiedNet(),
        optimizer="sgd",
        optimizerParams={"momentum": 0.9},
        learningRate=0.1,
        maxEpochs=2,
        batchSize=6,
        thresholds=THRESHOLDS,
        verbose=False,
    )
    return Pipeline(stages=[VectorAssembler(inputCols=["x", "y", "z"], outputCol="features"), classifier])


@pytest.fixture(scope="module")
def fitted(pipeline: Pipeline, points: DataFrame) -> PipelineModel:
    return pipeline.fit(points)


@pytest.fixture(scope="module")
def model(fitted: PipelineModel) -> TorchClassificationModel:
    found: TorchClassificationModel = fitted.stages[1]
    return found


@pytest.fixture(scope="module")
def written(model: TorchClassificationModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What saving the model wrote, in a directory whose name asks for care; no test changes it."""
    path = tmp_path_factory.mktemp("written") / "50% of a model"
    model.save(str(path))
    return path


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    """A saved model that a test may change."""
    return shutil.copytree(written, tmp_path / written.name)


@pytest.fixture
def estimator() -> TorchEstimator:
    return TorchEstimator(module=make_tied_net, loss=absolute_error, optimizer=make_sgd)


# ---- models ----------------------------------------------------------------------------------------------------------
def test_a_saved_model_is_json_and_safetensors(model: TorchClassificationModel, saved: Path) -> None:
    assert files_of(saved) == FILES
    metadata = metadata_of(saved)
    assert metadata["class"] == "sparkdl.model.TorchClassificationModel"
    assert (metadata["uid"], metadata["formatVersion"]) == (model.uid, 1)
    assert metadata["paramMap"]["thresholds"] == THRESHOLDS
    assert not {"module", "loss", "optimizer"} & metadata["paramMap"].keys()

    weights = safetensors.torch.load_file(saved / "weights.safetensors")
    state = model.module.state_dict()
    assert set(weights) == {"first.weight", "first.bias", "second.bias"}, "a tied weight is stored once"
    for name, value in weights.items():
        assert torch.equal(value, state[name])


def test_a_loaded_model_is_the_one_that_was_saved(
    model: TorchClassificationModel, saved: Path, fitted: PipelineModel, points: DataFrame
) -> None:
    loaded = TorchClassificationModel.load(str(saved))
    assert loaded.uid == model.uid
    assert loaded.history == model.history
    assert loaded.summary == model.summary
    assert loaded.getThresholds() == THRESHOLDS
    assert (loaded.numClasses, loaded.numFeatures) == (3, 3)
    assert not loaded.module.training
    assert torch.equal(outputs(loaded.module), outputs(model.module))
    assert loaded.module.second.weight is loaded.module.first.weight
    assembled = fitted.stages[0].transform(points)
    assert predictions(loaded, assembled) == predictions(model, assembled)
    assert loaded.copy({loaded.predictionCol: "found"}).transform(assembled).columns[-1] == "found"


def test_saving_twice_needs_overwrite(model: TorchClassificationModel, saved: Path) -> None:
    with pytest.raises(PySparkException, match=r"(?i)already.exists"):
        model.save(str(saved))
    (saved / "left over").write_text("from the first time")
    model.write().overwrite().save(str(saved))
    assert files_of(saved) == FILES
    assert TorchClassificationModel.load(str(saved)).uid == model.uid


def test_a_model_of_another_class_is_refused(saved: Path) -> None:
    message = r"holds a sparkdl\.model\.TorchClassificationModel; load it with that class, not with .*RegressionModel"
    with pytest.raises(PersistenceError, match=message):
        TorchRegressionModel.load(str(saved))


def test_a_newer_format_is_refused(saved: Path) -> None:
    doctor(saved, lambda metadata: metadata.update(formatVersion=2))
    with pytest.raises(
        PersistenceError, match=r"has format 2, this version of sparkdl reads up to 1\. Install a newer"
    ):
        TorchClassificationModel.load(str(saved))


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "weights.safetensors").unlink()
    with pytest.raises(PersistenceError, match=r"weights\.safetensors is missing; the save was not completed"):
        TorchClassificationModel.load(str(saved))


def test_weights_of_another_module_are_refused(saved: Path) -> None:
    other = safetensors.torch.save({"first.weight": torch.zeros(5, 5)})
    replace_file(saved / "weights.safetensors", other)
    with pytest.raises(PersistenceError, match="The weights do not fit the module TiedNet"):
        TorchClassificationModel.load(str(saved))


# ---- pipelines -------------------------------------------------------------------------------------------------------
IN_A_FRESH_PROCESS = """
    import json, sys
    from pyspark.ml import PipelineModel
    from pyspark.sql import SparkSession
    import sparkdl
    from sparkdl.errors import PersistenceError

    model, estimator, rows, found = sys.argv[1:]
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.driver.host", "127.0.0.1").getOrCreate()
    for kind, path in ((PipelineModel, model), (sparkdl.TorchEstimator, estimator)):
        try:
            kind.load(path)
        except PersistenceError as error:
            assert "in none of the trusted packages" in str(error), error
            assert "sparkdl.allow_modules('tests')" in str(error), error
        else:
            raise AssertionError(f"{path} was loaded without asking")
    assert "tests.spark.modules" not in sys.modules
    sparkdl.allow_modules("tests.spark.modules")
    shown = PipelineModel.load(model).transform(spark.read.json(rows)).orderBy("x").collect()
    loss = sparkdl.TorchEstimator.load(estimator).getLoss()
    answer = {"loss": loss.__name__, "probability": [row["probability"].toArray().tolist() for row in shown]}
    with open(found, "w") as file:
        json.dump({**answer, "prediction": [row["prediction"] for row in shown]}, file)
    spark.stop()
"""


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same_once_it_trusts_the_classes(
    fitted: PipelineModel, estimator: TorchEstimator, points: DataFrame, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in ("model", "estimator", "rows", "found.json")]
    fitted.save(paths[0])
    estimator.save(paths[1])
    points.write.json(paths[2])
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_A_FRESH_PROCESS), *paths],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(Path(paths[3]).read_text())
    expected = predictions(fitted, points)
    assert found["loss"] == "absolute_error"
    assert found["prediction"] == [row["prediction"] for row in expected]
    torch.testing.assert_close(
        torch.tensor(found["probability"]), torch.tensor([row["probability"].toArray().tolist() for row in expected])
    )


def test_an_unfitted_pipeline_comes_back(pipeline: Pipeline, tmp_path: Path) -> None:
    path = str(tmp_path / "pipeline")
    pipeline.save(path)
    assembler, classifier = Pipeline.load(path).getStages()
    before = pipeline.getStages()[1]
    assert assembler.getInputCols() == ["x", "y", "z"]
    assert classifier.uid == before.uid
    for param in before.params:
        assert classifier.isSet(param.name) == before.isSet(param.name), param.name
        if param.name != "module" and before.isDefined(param):
            assert classifier.getOrDefault(param.name) == before.getOrDefault(param), param.name
    assert isinstance(classifier.getModule(), TiedNet)
    assert torch.equal(outputs(classifier.getModule()), outputs(before.getModule()))


# ---- estimators ------------------------------------------------------------------------------------------------------
def test_an_estimator_keeps_the_weights_of_module_and_loss(tmp_path: Path) -> None:
    path = tmp_path / "estimator"
    module = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    before = TorchClassifier(module=module, loss=loss, optimizer="adam", optimizerParams={"betas": (0.5, 0.6)})
    before.save(str(path))
    assert files_of(path) == FILES | {"loss.safetensors"}
    loaded = TorchClassifier.load(str(path))
    assert loaded.getModule() is not module
    assert torch.equal(outputs(loaded.getModule()), outputs(module))
    target = torch.tensor([0, 1, 2, 0])
    assert torch.equal(loaded.getLoss()(outputs(module), target), loss(outputs(module), target))
    assert (loaded.getLoss().reduction, loaded.getLoss().label_smoothing) == ("mean", 0.1)
    assert (loaded.getOptimizer(), tuple(loaded.getOptimizerParams()["betas"])) == ("adam", (0.5, 0.6))


def test_functions_of_an_estimator_are_stored_by_name_and_refused_until_their_package_is_trusted(
    estimator: TorchEstimator, tmp_path: Path
) -> None:
    path = tmp_path / "estimator"
    estimator.save(str(path))
    assert files_of(path) == {"metadata"}
    names = {role: described["import"] for role, described in metadata_of(path)["objects"].items()}
    assert names == {
        "module": "tests.spark.modules:make_tied_net",
        "loss": "tests.spark.modules:absolute_error",
        "optimizer": "tests.spark.modules:make_sgd",
    }
    message = r"asks for the function tests\.spark\.modules:\w+, .*If you trust it, call sparkdl\.allow_modules\('tests"
    with pytest.raises(PersistenceError, match=message):
        TorchEstimator.load(str(path))


# ---- pickles, by value and only on request ---------------------------------------------------------------------------
UNNAMED: dict[str, tuple[Callable[[], Any], str]] = {
    "a module of a local class": (
        lambda: TorchRegressor(module=local_net()),
        r"LocalNet.* cannot be imported by its name.*\.option\(\"allowPickle\", \"true\"\)",
    ),
    "a lambda as module": (
        lambda: TorchRegressor(module=lambda: nn.Linear(3, 3)),
        r"The module .*lambda.* cannot be imported by its name.*\.option\(\"allowPickle\", \"true\"\)",
    ),
    "a lambda as loss": (
        lambda: TorchEstimator(module=nn.Linear(3, 3), loss=lambda output, label: output - label),
        r"The loss .*lambda.* cannot be imported by its name.*\.option\(\"allowPickle\", \"true\"\)",
    ),
    "a lambda as optimizer": (
        lambda: TorchRegressor(module=nn.Linear(3, 3), optimizer=lambda found: torch.optim.SGD(found, lr=1.0)),
        r"The optimizer .*lambda.* cannot be imported by its name.*\.option\(\"allowPickle\", \"true\"\)",
    ),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_what_has_no_name_is_not_saved_unasked(spark: SparkSession, tmp_path: Path, name: str) -> None:
    make, message = UNNAMED[name]
    with pytest.raises(PersistenceError, match=message):
        make().save(str(tmp_path / "estimator"))
    assert list(tmp_path.iterdir()) == [], "a refused save leaves nothing behind"


@pytest.mark.parametrize("name", UNNAMED)
def test_what_has_no_name_travels_as_a_pickle_where_both_sides_allow_it(
    spark: SparkSession, tmp_path: Path, name: str
) -> None:
    path = str(tmp_path / "estimator")
    before = UNNAMED[name][0]()
    before.write().option("allowPickle", "true").save(path)
    assert "objects.pickle" in files_of(tmp_path / "estimator")
    with pytest.raises(PersistenceError, match=r"was saved as a pickle, and unpickling runs code from the file"):
        type(before).load(path)
    loaded = type(before).read().option("allowPickle", "true").load(path)
    module = before.getModule()
    if isinstance(module, nn.Module):
        assert torch.equal(outputs(loaded.getModule()), outputs(module))
    else:
        assert loaded.getModule()().weight.shape == (3, 3)
    if not isinstance(before.getLoss(), str):
        assert loaded.getLoss()(3, 1) == 2
    if not isinstance(before.getOptimizer(), str):
        assert isinstance(loaded.getOptimizer()(nn.Linear(1, 1).parameters()), torch.optim.SGD)


@pytest.fixture
def pickles_allowed(spark: SparkSession) -> Iterator[None]:
    spark.conf.set(ALLOW_CONF, "true")
    yield
    spark.conf.unset(ALLOW_CONF)


def test_pipelines_with_pickles_are_saved_and_loaded_where_the_session_allows_it(
    spark: SparkSession, points: DataFrame, tmp_path: Path, pickles_allowed: None
) -> None:
    """A pipeline hands no options to its stages: the conf speaks for them."""
    path = str(tmp_path / "pipeline")
    assembler = VectorAssembler(inputCols=["x", "y", "z"], outputCol="features")
    classifier = TorchClassifier(module=local_net(), maxEpochs=1, verbose=False)
    fitted = Pipeline(stages=[assembler, classifier]).fit(points)
    fitted.save(path)
    loaded = PipelineModel.load(path)
    assert predictions(loaded, points) == predictions(fitted, points)
    spark.conf.unset(ALLOW_CONF)
    with pytest.raises(PersistenceError, match=f"set {ALLOW_CONF}=true for stages of a pipeline"):
        PipelineModel.load(path)


# ---- files that are not to be trusted --------------------------------------------------------------------------------
class Planted:
    """Unpickling it makes a file."""

    def __init__(self, evidence: Path) -> None:
        self._evidence = evidence

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self._evidence), "w")


@pytest.fixture
def no_system(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test where anything calls os.system."""
    calls: list[Any] = []
    monkeypatch.setattr(os, "system", lambda *given, **named: calls.append((given, named)))
    yield
    assert calls == []


def test_a_pickle_that_was_not_asked_for_is_not_opened(saved: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    (saved / "objects.pickle").write_bytes(pickle.dumps(Planted(evidence)))
    TorchClassificationModel.load(str(saved))  # nothing in the metadata asks for it
    doctor(saved, lambda metadata: metadata["objects"].update(module={"pickle": "module"}))
    with pytest.raises(PersistenceError, match="unpickling runs code from the file"):
        TorchClassificationModel.load(str(saved))
    assert not evidence.exists()


@pytest.mark.parametrize("name", ["os:system", "posix:system", "torch.nn.functional:torch.os.system", "nowhere:net"])
def test_a_model_that_names_a_function_as_its_module_runs_nothing(saved: Path, no_system: None, name: str) -> None:
    doctor(saved, lambda metadata: metadata["objects"]["module"]["module"].update({"class": name}))
    with pytest.raises(PersistenceError, match=r"^The file (names|asks for)"):
        TorchClassificationModel.load(str(saved))


@pytest.mark.parametrize("attribute", ["forward", "eval", "load_state_dict", "activation"])
@pytest.mark.parametrize("name", ["os:system", "torch.nn.functional:torch.os.system"])
def test_a_model_that_names_a_function_as_an_attribute_runs_nothing(
    saved: Path, no_system: None, attribute: str, name: str
) -> None:
    doctor(
        saved,
        lambda metadata: metadata["objects"]["module"]["module"]["attributes"].update({attribute: {"import": name}}),
    )
    with pytest.raises(PersistenceError):
        TorchClassificationModel.load(str(saved))


@pytest.mark.parametrize("role", ["module", "loss", "optimizer"])
def test_an_estimator_that_names_a_function_of_the_system_runs_nothing(
    estimator: TorchEstimator, tmp_path: Path, no_system: None, role: str
) -> None:
    path = tmp_path / "estimator"
    estimator.copy({estimator.module: nn.Linear(3, 3), estimator.loss: "mse", estimator.optimizer: "sgd"}).save(
        str(path)
    )
    doctor(path, lambda metadata: metadata["objects"].update({role: {"import": "os:system"}}))
    with pytest.raises(PersistenceError, match=r"asks for the function os:system, which is in none of the trusted"):
        TorchEstimator.load(str(path))


def test_a_stage_of_another_package_cannot_be_named_as_the_class(saved: Path, no_system: None) -> None:
    doctor(saved, lambda metadata: metadata.update({"class": "os.system"}))
    with pytest.raises(PersistenceError, match=r"holds a os\.system; load it with that class, not with sparkdl\.model"):
        TorchClassificationModel.load(str(saved))
