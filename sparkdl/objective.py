"""The loss as the mean over the global batch, whoever computes which rows of it.

A rank cannot take a mean: it does not know the other ranks' rows. So every loss is brought to a sum over rows and a
denominator, and the division is by the denominator of all ranks. With row weights, class weights or ``ignore_index``
the denominator is not a number of rows.

An objective also knows how the module is called: with the inputs in order, or by the user's own steps, which see a
batch as a dict from column name to tensor.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import Columns
from sparkdl.errors import ConfigError

__all__ = ["Loss", "Objective", "Step", "TrainingStep", "build_loss", "call_module", "loss_names", "wants_class_labels"]

Loss = str | nn.Module | Callable[..., Tensor]
Step = Callable[[nn.Module, dict[str, Tensor]], Any]
"""A function of the user's, of a module and a batch: tensors by column name."""

_NAMED: dict[str, type[nn.Module]] = {
    "binary_cross_entropy": nn.BCELoss,
    "binary_cross_entropy_with_logits": nn.BCEWithLogitsLoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "hinge_embedding": nn.HingeEmbeddingLoss,
    "huber": nn.HuberLoss,
    "kl_div": nn.KLDivLoss,
    "l1": nn.L1Loss,
    "mse": nn.MSELoss,
    "multi_margin": nn.MultiMarginLoss,
    "multilabel_soft_margin": nn.MultiLabelSoftMarginLoss,
    "nll": nn.NLLLoss,
    "poisson_nll": nn.PoissonNLLLoss,
    "smooth_l1": nn.SmoothL1Loss,
    "soft_margin": nn.SoftMarginLoss,
}
_TorchLoss = nn.modules.loss._Loss  # the base of all torch losses
_CLASS_INDEX_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_INTEGER_TARGETS = (*_CLASS_INDEX_LOSSES, nn.MultiLabelMarginLoss)


def loss_names() -> list[str]:
    """Names that `build_loss` knows: those of `torch.nn.functional` without ``_loss``."""
    return sorted(_NAMED)


def build_loss(loss: Loss) -> Callable[..., Tensor]:
    """A loss by name, or a copy of the caller's own.

    Raises:
        ConfigError: An unknown name, or something that is not callable.
    """
    if isinstance(loss, str):
        known = _NAMED.get(re.sub(r"_loss$", "", loss.lower()))
        if known is None:
            raise ConfigError(f"loss={loss!r} is not known. Use one of {', '.join(loss_names())}, or a callable.")
        return known()
    if isinstance(loss, type) or not callable(loss):
        raise ConfigError(f"loss={loss!r} cannot be called with (output, label). Pass an instance, not a class.")
    if not isinstance(loss, nn.Module):
        return loss
    try:
        return copy.deepcopy(loss)
    except Exception as error:
        raise ConfigError(
            f"The loss {type(loss).__name__} cannot be copied: {error}. It must be picklable to travel to the "
            "executors; keep locks, sockets and open files out of it."
        ) from error


class Objective(nn.Module):
    """A loss over part of a batch, as a sum and its denominator.

    Args:
        loss: Called with (output, label): a torch loss, which is used per row; or any callable that returns one value
            per row, or the mean over the rows that it was given.
        binary: True for a classifier, whose single output is then the logit of class 1.
        prediction_step: The user's way to get the module's output; None calls it with the inputs in order.
        input_names: Names of the inputs, for ``prediction_step``.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        binary: bool = False,
        prediction_step: Step | None = None,
        input_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.loss = loss
        self.binary = binary
        self.prediction_step = prediction_step
        self.input_names = tuple(input_names)
        self.reduction = getattr(loss, "reduction", None)
        if self.reduction in ("mean", "sum") and isinstance(loss, nn.Module):
            self.loss = copy.deepcopy(loss)
            setattr(self.loss, "reduction", "none")  # noqa: B010 - an attribute that only torch losses declare

    def compute(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward of the module and the loss of its output.

        Returns:
            The sum of the (weighted) losses of the rows, shape (); and, by name, sums over the rows of what else a
            `TrainingStep` returned, detached.
        """
        loss: Tensor = self(module(*batch.inputs), batch.labels, batch.weight)
        return loss, {}

    def evaluate(self, module: nn.Module, batch: Batch, *, with_outputs: bool) -> tuple[Tensor, dict[str, Tensor], Any]:
        """As `compute`, and the module's output as transform sees it, where that is asked for."""
        if self.prediction_step is not None or not with_outputs:
            loss, logged = self.compute(module, batch)
            return loss, logged, self.predict(module, batch.inputs) if with_outputs else None
        outputs = module(*batch.inputs)
        loss = self(outputs, batch.labels, batch.weight)
        return loss, {}, outputs

    def predict(self, module: nn.Module, inputs: Sequence[Tensor]) -> Any:
        """The module's output for these inputs, as transform sees it."""
        return call_module(module, inputs, self.prediction_step, self.input_names)

    def forward(self, outputs: Any, labels: tuple[Tensor, ...], weight: Tensor | None) -> Tensor:
        """Sum of the (weighted) losses of the rows.

        Args:
            outputs: What the module returned.
            labels: One tensor per label column.
            weight: Row weights of shape (rows,), or None.

        Raises:
            ConfigError: Output and label do not fit the loss, or row weights meet a loss that returns a mean.
        """
        rows = len(labels[0])
        scores, label = self._fitted(outputs, labels)
        losses = self.loss(scores, label)
        compared = [value.shape for value in (scores, label) if isinstance(value, Tensor)]
        if losses.ndim > 1 and losses.shape[1] == rows == len(losses) and losses.shape not in compared:
            raise ConfigError(
                f"The loss {_name(self.loss)} returned shape {tuple(losses.shape)} for {rows} rows: it compares every "
                f"row with every other. The output is {_shape(outputs)}, the label {_shape(label)}; bring them to one "
                "shape in the loss, or return (rows,) from the module."
            )
        if losses.ndim == 0 and self.reduction == "sum" and weight is None:
            return losses
        return _sum_over_rows(losses, rows, weight, f"The loss {_name(self.loss)}")

    def try_on(self, outputs: Any, labels: tuple[Tensor, ...], weight: Tensor | None) -> Tensor:
        """As `forward`, for the first rows: whatever the loss raises then is about shapes and types, and is shown so.

        Raises:
            ConfigError: The loss cannot take output and label.
        """
        try:
            loss: Tensor = self(outputs, labels, weight)
        except ConfigError:
            raise
        except Exception as error:
            shown = labels[0] if len(labels) == 1 else labels
            raise ConfigError(
                f"The loss {_name(self.loss)} cannot take the module's output {_shape(outputs)} with labels "
                f"{_shape(shown)}: {error}"
            ) from error
        return loss

    @property
    def counts_rows(self) -> bool:
        """True where, without row weights, the denominator is the number of rows, so that ranks know it unasked."""
        if isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss):
            return self.loss.weight is None and self.loss.ignore_index < 0 and self.reduction != "sum"
        return self.reduction != "sum"

    def denominator(self, labels: tuple[Tensor, ...], weight: Tensor | None) -> float:
        """What these rows add to the divisor of the global mean; needs no output.

        A loss that the caller asked to be summed has none: 0.
        """
        rows = len(labels[0])
        if self.reduction == "sum":
            return 0.0
        share = torch.ones(rows, dtype=torch.float64)
        loss, label = self.loss, labels[0].cpu()
        if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and not label.is_floating_point():
            kept = label != loss.ignore_index
            share = kept.double()
            if loss.weight is not None:
                share *= loss.weight.double().cpu()[torch.where(kept, label, 0)]
            share = share.flatten(1).mean(1) if share.ndim > 1 else share
        return float((share if weight is None else share * weight.cpu()).sum())

    def batch_denominator(self, batch: Batch) -> float:
        """What a batch's rows add to the divisor of the mean loss."""
        if batch.weight is None and self.counts_rows:
            return float(batch.rows)
        return self.denominator(batch.labels, batch.weight)

    def _fitted(self, outputs: Any, labels: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """Output and label in the shapes that the loss compares without broadcasting them to (rows, rows)."""
        if len(labels) != 1 or not isinstance(outputs, Tensor):
            return outputs, labels if len(labels) != 1 else labels[0]
        label = labels[0]
        if outputs.dtype in (torch.float16, torch.bfloat16):  # of mixed precision: labels must not become as coarse
            outputs = outputs.float()
        compares_numbers = isinstance(self.loss, _TorchLoss) and not isinstance(self.loss, _INTEGER_TARGETS)
        if self.binary and (outputs.ndim == 1 or outputs.shape[1:] == (1,)):
            logit = outputs.reshape(-1)
            if isinstance(self.loss, nn.CrossEntropyLoss):
                # The softmax of (0, z) is the sigmoid of z: class weights and label smoothing keep their meaning.
                return torch.stack([torch.zeros_like(logit), logit], 1), label
            if compares_numbers:
                return logit, label.to(logit.dtype)
        if compares_numbers:
            label = label.to(outputs.dtype)
        if not label.is_floating_point():
            return outputs, label
        if label.ndim + 1 == outputs.ndim and outputs.shape[-1] == 1:
            label = label[..., None]
        elif label.ndim == outputs.ndim + 1 and label.shape[-1] == 1:
            label = label[..., 0]
        if label.shape != outputs.shape and compares_numbers:
            raise ConfigError(
                f"The module's output has shape {tuple(outputs.shape)}, the label {tuple(label.shape)}; "
                f"{_name(self.loss)} needs one output per target."
            )
        return outputs, label


class TrainingStep(Objective):
    """A user's function from (module, batch) to the loss, in the place of one from (output, label).

    Args:
        step: Returns the mean over the batch's rows, or one value per row; or a dict of ``"loss"`` and further numbers,
            which are means over the rows or one value per row as well.
        columns: Whose names the batch has.
        binary: As for `Objective`.
        prediction_step: As for `Objective`.
        shows_output: True where the module's output is asked for as well, and has to be there.
    """

    def __init__(
        self,
        step: Step,
        columns: Columns,
        *,
        binary: bool = False,
        prediction_step: Step | None = None,
        shows_output: bool = False,
    ) -> None:
        input_names = [column.name for column in columns.inputs]
        super().__init__(_no_loss, binary=binary, prediction_step=prediction_step, input_names=input_names)
        self.step = step
        self.shows_output = shows_output
        self.label_names = tuple(column.name for column in columns.labels)
        self.weight_name = None if columns.weight is None else columns.weight.name

    def compute(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.compute`."""
        given = dict(zip(self.input_names, batch.inputs, strict=True))
        given.update(zip(self.label_names, batch.labels, strict=True))
        if self.weight_name is not None and batch.weight is not None:
            given[self.weight_name] = batch.weight
        found, rows = self.step(module, given), batch.rows
        named = found if isinstance(found, Mapping) else {"loss": found}
        for name, value in named.items():
            if not isinstance(value, Tensor) and not (isinstance(value, int | float) and name != "loss"):
                raise ConfigError(
                    f"The trainingStep returned a {type(value).__name__} as {name!r}. Return tensors: the mean over "
                    "the batch's rows or one value per row."
                )
        if "loss" not in named:
            raise ConfigError(
                f"The trainingStep returned a dict of {', '.join(map(repr, named)) or 'nothing'}, without 'loss', "
                "which is minimised."
            )
        loss = _sum_over_rows(named["loss"], rows, batch.weight, "The trainingStep")
        logged = {
            name: _sum_over_rows(torch.as_tensor(value).detach(), rows, None, f"The trainingStep's {name!r}")
            for name, value in named.items()
            if name != "loss"
        }
        return loss, logged

    def try_step(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `compute`, for the first rows: what the user's step raises then is shown with what it was given.

        Raises:
            ConfigError: The step failed, or returned something else than a loss.
        """
        try:
            return self.compute(module, batch)
        except ConfigError:
            raise
        except Exception as error:
            given = dict(zip((*self.input_names, *self.label_names), (*batch.inputs, *batch.labels), strict=True))
            raise ConfigError(
                f"The trainingStep failed on its first rows, with the batch {_shape(given)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def evaluate(self, module: nn.Module, batch: Batch, *, with_outputs: bool) -> tuple[Tensor, dict[str, Tensor], Any]:
        """See `Objective.evaluate`."""
        loss, logged = self.compute(module, batch)
        return loss, logged, self.predict(module, batch.inputs) if with_outputs else None

    @property
    def counts_rows(self) -> bool:
        """See `Objective.counts_rows`."""
        return True

    def denominator(self, labels: tuple[Tensor, ...], weight: Tensor | None) -> float:
        """See `Objective.denominator`."""
        return float(len(labels[0])) if weight is None else float(weight.double().sum())


def call_module(
    module: nn.Module, inputs: Sequence[Tensor], step: Step | None = None, names: Sequence[str] = ()
) -> Any:
    """The module's output: of the user's own step where there is one, else of the module called with the inputs.

    Args:
        module: The module.
        inputs: One tensor per input column, in order.
        step: The user's predictionStep.
        names: Names of the input columns.
    """
    if step is None:
        return module(*inputs)
    return step(module, dict(zip(names, inputs, strict=True)))


def _no_loss(output: Any, label: Any) -> Tensor:
    raise AssertionError("a training step computes its own loss")


def _sum_over_rows(losses: Tensor, rows: int, weight: Tensor | None, who: str) -> Tensor:
    """Sum of the (weighted) losses of the rows, from one value per row or from their mean."""
    if losses.ndim == 0:
        if weight is not None:
            raise ConfigError(
                f"weightCol is set, but {who[0].lower()}{who[1:]} returned one number for {rows} rows. "
                "Return one value per row, shape (rows,), so that rows can be weighted."
            )
        return losses * rows
    if len(losses) != rows:
        raise ConfigError(
            f"{who} returned shape {tuple(losses.shape)} for {rows} rows. Return one value per row, or the mean over "
            "the rows."
        )
    per_row = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
    return (per_row if weight is None else per_row * weight).sum()


def wants_class_labels(loss: Callable[..., Tensor] | None) -> bool:
    """True where the loss takes class numbers (int64) as labels."""
    return isinstance(loss, _CLASS_INDEX_LOSSES)


def _name(loss: Any) -> str:
    if isinstance(loss, nn.Module):
        return type(loss).__name__
    return getattr(loss, "__qualname__", None) or type(loss).__name__


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}, {value.dtype}".replace("torch.", "")
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_shape(entry) for entry in value) + ")"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shape(entry)}" for key, entry in value.items()) + "}"
    return f"of type {type(value).__name__}"
