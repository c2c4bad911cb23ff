"""The exception tree: as drawn, catchable by the usual Python classes, and able to travel."""

import copy
import inspect
import pickle
import re

import pytest

from sparkdl import errors
from sparkdl.errors import Failure, SparkdlError, TrainingFailedError

PARENTS = {
    "SparkdlError": (Exception,),
    "ConfigError": (SparkdlError, ValueError),
    "DataError": (SparkdlError, ValueError),
    "LaunchError": (SparkdlError, RuntimeError),
    "SlotsError": (errors.LaunchError,),
    "ExecutorPythonError": (errors.LaunchError,),
    "PersistenceError": (SparkdlError, ValueError),
    "CheckpointError": (SparkdlError, RuntimeError),
    "CallbackError": (SparkdlError, RuntimeError),
    "TrainingFailedError": (SparkdlError, RuntimeError),
}
CLASSES = [getattr(errors, name) for name in PARENTS]
FAILURE = Failure(1, "10.0.0.2:40001", "ValueError", "planted", "Traceback ...", consequence=False)


@pytest.mark.parametrize("name", PARENTS)
def test_every_error_has_its_place_in_the_tree(name: str) -> None:
    assert getattr(errors, name).__bases__ == PARENTS[name]


def test_the_tree_drawn_in_the_module_is_the_tree() -> None:
    drawing = (errors.__doc__ or "").split("\n\n")[1]
    drawn: list[tuple[int, str]] = [(match.start(), match[0]) for match in re.finditer(r"\w+Error\b", drawing)]
    drawn = [(start, name) for start, name in drawn if name in PARENTS]
    assert sorted(name for _, name in drawn) == sorted(PARENTS)
    for line in drawing.splitlines():
        names = re.findall(r"\w+Error\b", line)
        depth = (len(line) - len(line.lstrip(" │├└─"))) // 4
        kind = getattr(errors, names[0])
        ours = [parent for parent in kind.__mro__ if parent.__name__ in PARENTS]
        assert len(ours) == depth, line
        if len(names) > 1:
            assert names[1] in [parent.__name__ for parent in kind.__bases__]


def test_all_that_is_defined_is_listed() -> None:
    defined = {
        name for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__) == {*PARENTS, "Failure"}


@pytest.mark.parametrize("kind", CLASSES)
def test_one_clause_catches_every_error(kind: type[SparkdlError]) -> None:
    with pytest.raises(SparkdlError, match="words"):
        raise kind("words")


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickling_and_copying(kind: type[SparkdlError]) -> None:
    for error in (pickle.loads(pickle.dumps(kind("words"))), copy.copy(kind("words"))):
        assert type(error) is kind
        assert str(error) == "words"


def test_a_failed_training_keeps_every_ranks_own_account() -> None:
    accounts = {1: FAILURE}
    error = TrainingFailedError("words", accounts)
    accounts.clear()
    assert error.failures == {1: FAILURE}
    assert TrainingFailedError("words").failures == {}
    assert pickle.loads(pickle.dumps(error)).failures == {1: FAILURE}
