"""OptimizerConfig: every option of the family, checked once, wherever it was written.

Options reach an optimizer as keyword arguments, per parameter group, as `key=value` words of a command line, or as a
TOML table. All four ways end in the same constructor, so all four get the same checks and the same error messages.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .options import check_names
from .values import Check, number, three_numbers, truth, truth_or_auto, whole_number, whole_numbers

# A floor smaller than this vanishes in float32 once it is multiplied by 1 - beta.
_SMALLEST_EPS = 1e-35


def _option(default: Any, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class OptimizerConfig:
    """Options of the Automagic_CameAMP optimizers. Immutable, and valid once it exists.

    Attributes:
        lr: learning rate at which every element starts; in [min_lr, max_lr].
        min_lr: lower bound of the learning-rate mask.
        max_lr: upper bound of the learning-rate mask.
        lr_bump: how far the mask of an element moves in one step of the warm-up.
        eps: floors of the second moment (and of the torque-aware damping), of the residual, and of the norm left by the
            orthogonal step.
        clip_threshold: bound of the root mean square of a parameter's scaled gradient.
        betas: decay rates of the momentum, the second moment and the residual; each in [0, 1).
        eta: ALLoRA's scale; rows of norm 0 get eta times the learning rate.
        beta1_decay: per-step decay of the momentum rate and of the Grams share; in (0, 1].
        weight_decay: strength of the adaptive weight decay, which acts in the first half of the warm-up.
        warmup_steps: length of the warm-up in optimizer steps; 0 for none.
        came: True for CAME scaling, False for AdaBelief clipping.
        full_finetune: True keeps ALLoRA off, whatever was detected.
        verbose: log a line of progress now and then through `logging`.
        context_window: contextual optimizers: steps of history; a spike of the loss is looked for from 11 on.
        edge_threshold: contextual optimizers: confidence at which a step counts as an edge case; in (0, 1].
        adaptation_rate: contextual optimizers: how fast the multiplier follows its target; in [0, 1].
        momentum_scales: contextual optimizers: update periods of the momenta, in steps; () for no such momenta.
        blocksize: 8-bit optimizers: the largest quantization block; a power of two from 64 to 4096.
        fused: native kernels in place of the rules: "auto", on a CPU if numba can be imported; True, wherever there
            are kernels, with one warning where there are none; False, never.
        factored: store second moment and residual of everything but vectors as the means of their rows and columns.
        cautious: mask the update where it disagrees with the gradient's sign.
        bias_correction: divide the mean squared residual by the share of its weights that an average that started at 0
            has gathered so far.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an option out of range.
    """

    lr: float = _option(1e-6, number)
    min_lr: float = _option(1e-7, number)
    max_lr: float = _option(1e-3, number)
    lr_bump: float = _option(3e-6, number)
    eps: tuple[float, float, float] = _option((1e-30, 1e-16, 1e-8), three_numbers)
    clip_threshold: float = _option(1.0, number)
    betas: tuple[float, float, float] = _option((0.8, 0.99, 0.999), three_numbers)
    eta: float = _option(2.0, number)
    beta1_decay: float = _option(0.9995, number)
    weight_decay: float = _option(5e-4, number)
    warmup_steps: int = _option(500, whole_number)
    came: bool = _option(True, truth)
    full_finetune: bool = _option(False, truth)
    verbose: bool = _option(False, truth)
    context_window: int = _option(100, whole_number)
    edge_threshold: float = _option(0.95, number)
    adaptation_rate: float = _option(0.1, number)
    momentum_scales: tuple[int, ...] = _option((1, 5, 10, 25), whole_numbers)
    blocksize: int = _option(4096, whole_number)
    fused: bool | str = _option("auto", truth_or_auto)
    factored: bool = _option(False, truth)
    cautious: bool = _option(False, truth)
    bias_correction: bool = _option(False, truth)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field.name, getattr(self, field.name)))
        self._check_ranges()

    def _check_ranges(self) -> None:
        _require(self.min_lr >= 0, "min_lr", self.min_lr, "a number of at least 0")
        _require(self.max_lr >= self.min_lr, "max_lr", self.max_lr, f"a number of at least min_lr ({self.min_lr:g})")
        bounds = f"a number from min_lr ({self.min_lr:g}) to max_lr ({self.max_lr:g})"
        _require(self.min_lr <= self.lr <= self.max_lr, "lr", self.lr, bounds)
        _require(self.lr_bump >= 0, "lr_bump", self.lr_bump, "a number of at least 0")
        in_range = all(_SMALLEST_EPS <= value <= 1 for value in self.eps)
        _require(in_range, "eps", self.eps, f"three numbers from {_SMALLEST_EPS:g} to 1")
        _require(self.clip_threshold > 0, "clip_threshold", self.clip_threshold, "a number above 0")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "three numbers from 0 to below 1")
        _require(self.eta >= 1e-9, "eta", self.eta, "a number of at least 1e-9")
        _require(0 < self.beta1_decay <= 1, "beta1_decay", self.beta1_decay, "a number above 0 and at most 1")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of at least 0")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a whole number of at least 0")
        _require(self.context_window >= 2, "context_window", self.context_window, "a whole number of at least 2")
        _require(0 < self.edge_threshold <= 1, "edge_threshold", self.edge_threshold, "a number above 0 and at most 1")
        _require(0 <= self.adaptation_rate <= 1, "adaptation_rate", self.adaptation_rate, "a number from 0 to 1")
        scales = self.momentum_scales
        distinct = all(scale >= 1 for scale in scales) and len(set(scales)) == len(scales)
        _require(distinct, "momentum_scales", scales, "different whole numbers of at least 1, or none")
        power_of_two = 64 <= self.blocksize <= 4096 and self.blocksize & (self.blocksize - 1) == 0
        _require(power_of_two, "blocksize", self.blocksize, "a power of two from 64 to 4096")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> OptimizerConfig:
        """Build a config from keyword options.

        Raises:
            TypeError: an unknown option, with the nearest known name, or a value of the wrong type.
            ValueError: a value out of range.
        """
        check_names(options, OPTION_NAMES)
        return cls(**options)

    @classmethod
    def from_toml(cls, table: Mapping[str, Any], file: str, arguments: Mapping[str, Any], lr: float) -> OptimizerConfig:
        """Build a config from the `[optimizer_config]` table of a TOML file and the options beside it.

        Args:
            table: the table as the TOML parser returned it; lists stand for tuples.
            file: the file's path, for error messages.
            arguments: what `parse_optimizer_args` returned; it wins over the table.
            lr: the learning rate, which neither of the two may set.

        Raises:
            ValueError: with the key, where it stands, what is allowed and, for an unknown key, the nearest known name.
        """
        for source, options in ((f"{file}: [optimizer_config]", table), ("optimizer_args", arguments)):
            if "lr" in options:
                raise ValueError(
                    f"{source}: has the key 'lr'. The learning rate is not set there: "
                    "it comes from learning_rate and from the parameter groups."
                )
            try:
                check_names(options, OPTION_NAMES)
                for name, value in options.items():
                    checked(name, value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}: {error}") from None
        try:
            return cls(**{**table, **arguments, "lr": lr})
        except (TypeError, ValueError) as error:
            if str(error).startswith("option 'lr' "):  # The user wrote no option of that name.
                raise ValueError(str(error).replace("option 'lr'", "learning_rate", 1)) from None
            source = file
            if arguments:
                with contextlib.suppress(ValueError):
                    cls(**{**table, "lr": lr})
                    source = "optimizer_args"  # All is well without them.
            raise ValueError(f"{source}: {error}") from None

    def replace(self, **options: Any) -> OptimizerConfig:
        """A copy with some options changed, checked as a whole again."""
        check_names(options, OPTION_NAMES)
        return dataclasses.replace(self, **options)

    def as_dict(self) -> dict[str, Any]:
        """Option names and values, in the order of the fields."""
        return {name: getattr(self, name) for name in OPTION_NAMES}


_FIELDS = {field.name: field for field in dataclasses.fields(OptimizerConfig)}
OPTION_NAMES: tuple[str, ...] = tuple(_FIELDS)


def checked(name: str, value: Any) -> Any:
    """The value of one option as its own type, checked without regard to the other options.

    Raises:
        TypeError: it is of another type.
        ValueError: it is not finite.
    """
    field = _FIELDS[name]
    return field.metadata["check"](name, value, field.default)


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"option '{name}' is {value!r}; allowed: {allowed}")
