"""Ways for ranks to train one module together; each is a `Strategy`."""

from sparkdl.parallel.ddp import DataParallel
from sparkdl.parallel.strategy import StepResult, Strategy

__all__ = ["DataParallel", "StepResult", "Strategy"]
