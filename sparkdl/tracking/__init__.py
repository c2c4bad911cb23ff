"""Trackers: where a fit's losses, metrics and model are written, by the driver, while the ranks train.

Every fit writes its events as JSON lines. `TensorBoard`, `MLflow` and `WeightsAndBiases` are given to an Estimator in
the Param ``trackers``. To make one imports nothing: their libraries are imported when a fit starts. A class of one's
own with the method of `Tracker` will do as well.
"""

from sparkdl.tracking.base import RunInfo, TrackedRun, Tracker, as_of_this_thread, check_trackers, flat_params
from sparkdl.tracking.feed import Tracking
from sparkdl.tracking.json_lines import events_url, read_events
from sparkdl.tracking.mlflow import MLflow
from sparkdl.tracking.tensorboard import TensorBoard
from sparkdl.tracking.wandb import WeightsAndBiases

__all__ = [
    "MLflow",
    "RunInfo",
    "TensorBoard",
    "TrackedRun",
    "Tracker",
    "Tracking",
    "WeightsAndBiases",
    "as_of_this_thread",
    "check_trackers",
    "events_url",
    "flat_params",
    "read_events",
]
