"""What a run needs to go on after a crash: its state on storage, and when and how it gets there."""

from sparkdl.checkpoint.saver import CheckpointSchedule, Preempted, Saver, open_saver, told_to_stop
from sparkdl.checkpoint.state import flatten_state, unflatten_state
from sparkdl.checkpoint.store import Checkpoint, CheckpointStore
from sparkdl.checkpoint.writer import AsyncWriter

__all__ = [
    "AsyncWriter",
    "Checkpoint",
    "CheckpointSchedule",
    "CheckpointStore",
    "Preempted",
    "Saver",
    "flatten_state",
    "open_saver",
    "told_to_stop",
    "unflatten_state",
]
