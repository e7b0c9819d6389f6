"""What the rules depend on at one step, beside the tensors, as one record that kernels read."""

from __future__ import annotations

from functools import cache

import numpy
import torch
from torch import Tensor

from ....groups import Group
from ....storage import blockwise, nibbles
from ....techniques.multiscale import Scale
from ...rules import StepScalars
from ..table import Batch
from .codes import joined_maps

# Which rules act; see `step.rules.StackOptions`.
_FLAGS = "early warmup has_polarity row_scaled came cautious decays driven contextual"

# Of the context, the distance between elements that it sees. Then addresses: the maps of codes, rate and share of each
# momentum, and where the context sees the scaled gradient and the change.
_NUMBERS = "step every maps rates shares grad_sample change_sample"

# See `step.rules.StepScalars` and `config.OptimizerConfig`. A rate is 1 less the decay; the scheduler's factor and the
# multiplier are 1 where there is none; share is 1 / S, of AGR's sum; softening is ALLoRA's 1 / eta^2.
_FLOATS = (
    "share rate2 eps1 clip_threshold clip_bound momentum_rate beta1 rate3 eps2 eps3 correction gradient_share lr_bump "
    "min_lr max_lr weight_decay multiplier scheduler softening turning_point"
)

_LARGEST = float(numpy.finfo(numpy.float32).max)

SETTINGS = numpy.dtype(
    [(name, numpy.bool_) for name in _FLAGS.split()]
    + [(name, numpy.int64) for name in _NUMBERS.split()]
    + [(name, numpy.float32) for name in _FLOATS.split()],
    align=True,
)
_NAMES = SETTINGS.names or ()


class Settings:
    """The settings of a batch at one step.

    Args:
        group: its group.
        batch: the batch.
        total: AGR's sum over the group, 0-d.
        decays: whether weights decay.
        multiplier: 0-d factor of all learning rates; None if no context drives the optimizer.
        every: distance between the elements that the context sees; 0 for none.

    Attributes:
        scales: the multi-scale momenta at this step.
        record: one of `SETTINGS`, in an array of one; it has addresses of memory that this object owns.
    """

    def __init__(
        self, group: Group, batch: Batch, total: Tensor, decays: bool, multiplier: Tensor | None, every: int
    ) -> None:
        config, traits = group.config, batch.traits
        phase = group.phase(batch.stacks[0])
        scalars = StepScalars.of(group, traits)
        self.scales = scalars.scales
        self._rates, self._shares = _of_momenta(self.scales)
        self._maps = _maps() if group.precision.codes_all else numpy.empty(0, dtype=numpy.uint8)
        eps1, eps2, eps3 = config.eps
        beta1, beta2, beta3 = config.betas
        values = {
            "early": phase.early,
            "warmup": phase.warmup,
            "has_polarity": traits.has_polarity,
            "row_scaled": traits.row_scaled,
            "came": config.came,
            "cautious": config.cautious,
            "decays": phase.early and decays,
            "driven": self._shares.any(),
            "contextual": multiplier is not None,
            "step": traits.step,
            "every": every,
            "maps": self._maps.ctypes.data,
            "rates": self._rates.ctypes.data,
            "shares": self._shares.ctypes.data,
            "share": _inverse(total.item()),
            "rate2": 1 - beta2,
            "eps1": eps1,
            "clip_threshold": config.clip_threshold,
            "clip_bound": scalars.clip_bound,
            "momentum_rate": 1 - scalars.momentum_rate,
            "beta1": beta1,
            "rate3": 1 - beta3,
            "eps2": eps2,
            "eps3": eps3,
            "correction": 1.0 if scalars.bias_correction is None else scalars.bias_correction,
            "gradient_share": scalars.gradient_share,
            "lr_bump": config.lr_bump,
            "min_lr": config.min_lr,
            "max_lr": config.max_lr,
            "weight_decay": config.weight_decay,
            "multiplier": 1.0 if multiplier is None else multiplier.item(),
            "scheduler": 1.0 if scalars.scheduler is None else scalars.scheduler,
            "softening": 1 / config.eta / config.eta,
            "turning_point": nibbles.turning_point(traits.step),
            "grad_sample": 0,  # See `show`.
            "change_sample": 0,
        }
        with numpy.errstate(all="ignore"):  # What float32 has no number for is infinite, or 0.
            self.record = numpy.array([tuple(values[name] for name in _NAMES)], dtype=SETTINGS)

    def show(self, scaled_grad: numpy.ndarray, change: numpy.ndarray) -> None:
        """Give the context memory for what it sees."""
        self.record["grad_sample"], self.record["change_sample"] = scaled_grad.ctypes.data, change.ctypes.data


def _inverse(total: float) -> float:
    """1 / S, as near to it as float32 has it: magnitudes are at most S, so a product stays below 1."""
    return min(1 / total, _LARGEST) if total > 0 else _LARGEST


def _of_momenta(scales: tuple[Scale, ...]) -> tuple[numpy.ndarray, numpy.ndarray]:
    rates = numpy.array([scale.rate for scale in scales], dtype=numpy.float32)
    return rates, numpy.array([scale.share for scale in scales], dtype=numpy.float32)


@cache
def _maps() -> numpy.ndarray:
    signed, root = (blockwise.tables_of(kind, torch.device("cpu")) for kind in (True, False))
    return joined_maps(signed, root)
