"""The one optimizer: groups, then batches, then the rules of a step (rules.py), then the weights.

A class of the family chooses how states are stored. Everything else is the same code.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checkpoint, gradients, lora
from .batches import Batch, Layout, Traits
from .checksum import checksum
from .compiling import Compiler
from .config import OptimizerConfig
from .context import ContextualOptimizationModule, as_scalar
from .fused import fused_first_pass, fused_step
from .groups import GroupOptions, GroupSums
from .readings import read
from .rounding import stochastic_round
from .rules import Phase, StackOptions, StepScalars, Watched, lr_factor, take_step_
from .sampling import Sampler
from .storage import Storage
from .storage.choice import full
from .storage.convert import is_kept, to_full
from .storage.full import Full
from .storage.momenta import momentum_storages
from .techniques import allora, lr_mask, multiscale
from .techniques.multiscale import momentum_count, momentum_name
from .workspace import Workspace

logger = logging.getLogger(__name__)

_VERBOSE_EVERY = 100


class Measured(NamedTuple):
    """A group after the first pass over its gradients.

    Attributes:
        number: the group's.
        batches: its batches; whatever follows but `sums` is for each of them.
        sums: what the rules need to know of its gradients as a whole.
        unusable: how many gradient elements are not usable, 0-d.
        watched: the gradient's elements that the context sees; empty without a context.
        gradients: the usable gradients where they are kept for the second pass, which takes them out.
    """

    number: int
    batches: list[Batch]
    sums: GroupSums
    unusable: list[Tensor]
    watched: list[Tensor]
    gradients: list[Tensor | None]


class CameAMP(Optimizer):
    """The engine of the Automagic_CameAMP family; use one of the four classes of `library.automagic_cameamp`.

    Args:
        params: parameters or parameter groups, as for every torch optimizer. A group may set any option for itself.
        config: all options at once; or
        options: the fields of `OptimizerConfig`, by name.

    Raises:
        TypeError: an unknown option, a value of the wrong type, or options beside `config`.
        ValueError: a value out of range.
    """

    # How a state is kept, from its name, the parameter's element count and the group's options.
    _choose_storage: Callable[[str, int, OptimizerConfig], Storage] = staticmethod(full)
    # Whether a context drives the learning rates, and multi-scale momenta the momentum.
    _contextual = False

    c_optim: ContextualOptimizationModule  # in the contextual optimizers alone
    _factors: set[Tensor] | None
    _factors_found: tuple[int, int] | None
    _positions: dict[Tensor, int]
    _layouts: dict[int, Layout]
    _compiler: Compiler
    _sampler: Sampler | None
    _known_storages: dict[tuple[int, Phase, torch.Size, bool], dict[str, Storage]]
    _workspace: Workspace

    def __init__(self, params: Any, config: OptimizerConfig | None = None, **options: Any) -> None:
        if config is None:
            config = OptimizerConfig.from_options(options)
        elif not isinstance(config, OptimizerConfig):
            raise TypeError(f"config is {config!r}; allowed: an OptimizerConfig")
        elif options:
            raise TypeError(f"give either config or options, not both; got config and {', '.join(options)}")
        self.config = config
        self._group_options: list[GroupOptions] = []
        self._names: dict[Tensor, str] = {}
        self._unusable: dict[torch.device, Tensor] = {}  # one tally a device: adding them up would read back
        self._unquantizable: set[Tensor] = set()
        self._losses: list[Tensor | float] = []  # reported since the last step
        if self._contextual:
            self.c_optim = ContextualOptimizationModule(
                config.context_window, config.edge_threshold, config.adaptation_rate
            )
        self._start_layout()
        super().__init__(params, config.as_dict())

    # Groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it does not set are the constructor's.

        Raises:
            TypeError, ValueError: as the constructor does, with the group's number. Nothing is added then.
        """
        number = len(self._group_options)
        options = GroupOptions.of(param_group, number, self.config)
        if self._contextual:
            options.check_shared(number, self.config)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if len(set(group["params"])) < len(group["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"parameter group {len(self.param_groups)}: lists a parameter twice, which would be updated twice; "
                "allowed: each parameter once, also where modules share it"
            )
        group["max_lr"] = options.config.max_lr
        self._group_options.append(options)
        self._names.update(zip(group["params"], group.get("param_names", ())))
        self._forget_layout()

    def set_parameter_names(self, names: Mapping[Tensor, str]) -> None:
        """Tell the names of parameters, by which LoRA factors are recognized for certain.

        Args:
            names: parameter to name; those of other optimizers are ignored.
        """
        own = {p for group in self.param_groups for p in group["params"]}
        self._names.update((p, name) for p, name in names.items() if p in own)
        self._forget_layout()

    # The step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a sparse or complex gradient, or a sharded parameter; before any parameter or state has
                changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if loss is not None:
                self.report_loss(loss)
        count = sum(len(group["params"]) for group in self.param_groups)
        if len(self.param_groups) != len(self._group_options) or (self._positions and count != len(self._positions)):
            raise RuntimeError("param_groups was changed by hand; add groups by add_param_group, and remove none")
        if self._factors is None:
            for group in self.param_groups:
                for p in group["params"]:
                    gradients.check_whole(p)
        active = [self._with_gradient(group["params"]) for group in self.param_groups]
        if not self.state and not any(active):
            gradients.warn_of_none(p for group in self.param_groups for p in group["params"])
        for params in active:
            for p in params:
                gradients.check(p)
        counted = [(number, self._count_step(number, params)) for number, params in enumerate(active) if params]
        self._take_step(counted)
        return loss

    def _take_step(self, counted: list[tuple[int, list[Batch]]]) -> None:
        """Take a step that has been counted, over the batches of each group, by its number."""
        # Graphs, of whichever group, need more memory than there is beside kept gradients.
        keeps = not any(self._group_options[number].config.fused for number, _ in counted)
        self._workspace.begin_step([batch for _, batches in counted for batch in batches] if keeps else [])
        measured = [self._measure(number, batches) for number, batches in counted]
        multiplier = self._observe(measured) if self._contextual and measured else None
        self._losses = []  # They were of this step, also where it had no gradient.
        watched: list[Watched] = []
        for group in measured:
            with self._compiling(group.number):
                for batch, decay in zip(group.batches, group.sums.decay_strengths):
                    kept = group.gradients.pop(0)
                    seen = self._update(group.number, batch, kept, group.sums.magnitude, decay, multiplier)
                    if seen is not None:
                        watched.append(seen)
                    del kept
            self._log_progress(group.number, group.batches)
        if multiplier is not None:
            everything = [batch for group in measured for batch in group.batches]
            grads, changes = (list(pieces) for pieces in zip(*watched))
            sampler = self._sample()
            self.c_optim.follow(sampler.gather(everything, grads), sampler.gather(everything, changes))

    def _compiling(self, number: int) -> AbstractContextManager[None]:
        """Around the work on a group: what is compiled where the group asks for it."""
        return self._compiler.active() if self._group_options[number].config.fused else nullcontext()

    @staticmethod
    def _with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
        return [p for p in params if p.grad is not None and p.numel() > 0]

    def _count_step(self, number: int, params: list[Tensor]) -> list[Batch]:
        """Count the step of some parameters of a group, and divide them into batches."""
        periods = self._momentum_scales(number)
        due: dict[int, list[tuple[str, bool]]] = {}  # at each step that a parameter is at, mostly one
        for p in params:
            state = self.state[p]
            step = state["step"] = state.get("step", 0) + 1
            if step not in due:
                due[step] = [(momentum_count(period), multiscale.is_due(period, step)) for period in periods]
            for count, is_due in due[step]:
                if is_due or count not in state:
                    state[count] = state.get(count, 0) + is_due
        return self._batches(number, params)

    # Context ----------------------------------------------------------------------------------------------------

    def report_loss(self, loss: Tensor | float) -> None:
        """Tell the loss that the gradients of the next step come from. Optimizers without a context ignore it.

        Several reports before one step, as with gradient accumulation, are averaged, and in a distributed run so are
        the ranks. A tensor stays on its device; nothing is read back.

        Args:
            loss: a number, or a tensor; of several elements the mean counts.

        Raises:
            TypeError: it is neither.
        """
        if not self._contextual:
            return
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach().float().mean())
        elif isinstance(loss, Real) and not isinstance(loss, bool):
            self._losses.append(float(loss))
        else:
            raise TypeError(f"the loss is {loss!r}; allowed: a number or a tensor")

    def _observe(self, measured: list[Measured]) -> Tensor:
        """Tell the context of a step before it is taken.

        Returns:
            The factor of this step's learning rates, 0-d.
        """
        batches = [batch for group in measured for batch in group.batches]
        gradient = self._sample().gather(batches, [piece for group in measured for piece in group.watched])
        device = gradient.device
        unusable = torch.stack([count.to(device) for group in measured for count in group.unusable]).sum()
        loss = None
        if self._losses:
            loss = torch.stack([as_scalar(reported, device) for reported in self._losses]).mean()
        self._tell_bounds()
        largest = max(float(group["lr"]) for group in self.param_groups)
        return self.c_optim.update_context(gradient, loss, largest, unusable)

    def _tell_bounds(self) -> None:
        largest = max(self._initial_lr(number) for number in range(len(self.param_groups)))
        self.c_optim.set_bounds(largest, max(options.config.max_lr for options in self._group_options))

    def _sample(self) -> Sampler:
        if self._sampler is None:
            self._sampler = Sampler([p.numel() for group in self.param_groups for p in group["params"]])
        return self._sampler

    def _watch_every(self) -> int:
        """Distance between the elements that the context sees of each tensor; 0 without a context."""
        return self._sample().every if self._contextual else 0

    def _momentum_scales(self, number: int) -> tuple[int, ...]:
        return self._group_options[number].config.momentum_scales if self._contextual else ()

    # The two passes of a step -----------------------------------------------------------------------------------

    def _measure(self, number: int, batches: list[Batch]) -> Measured:
        """First pass over a group's gradients."""
        config = self._group_options[number].config
        decays = config.weight_decay > 0 and any(self._phase(number, batch).early for batch in batches)
        magnitudes, unusable, watched, kept = [], [], [], []
        with self._compiling(number):
            for batch in batches:
                work = self._workspace.lend(batch)
                g = batch.gradients(work.gradients)
                if config.fused:
                    found = fused_first_pass(g, decays, self._watch_every())
                else:
                    found = gradients.first_pass(g, decays, self._watch_every(), work.scratch)
                magnitudes.append(found.magnitudes)
                unusable.append(found.unusable)
                if found.watched is not None:
                    watched.append(found.watched)
                kept.append(g if self._workspace.keeps(batch) else None)
                del g, found, work
        self._tally(unusable)
        return Measured(number, batches, GroupSums.of(batches, magnitudes), unusable, watched, kept)

    def _update(
        self,
        number: int,
        batch: Batch,
        kept: Tensor | None,
        magnitude_sum: Tensor,
        decay: Tensor | None,
        multiplier: Tensor | None,
    ) -> Watched | None:
        """Second pass: one stack through the rules. Gradients that were not kept are gathered again."""
        config = self._group_options[number].config
        traits = batch.traits
        storages = self._bind(number, batch)
        states = batch.states(storages)
        scalars = StepScalars.at(traits.step, config, self._scheduler_factor(number), traits.momentum_counts)
        work = self._workspace.lend(batch)
        g = batch.gradients(work.gradients) if kept is None else kept
        phase = self._phase(number, batch)
        options = StackOptions(phase, traits.has_polarity, traits.row_scaled, config, self._watch_every())
        total = magnitude_sum.to(g.device)
        factor = None if multiplier is None else multiplier.to(g.device)
        if config.fused:
            p, watched = fused_step(g, states, total, decay, factor, work, scalars, options)
        else:
            if kept is None:
                gradients.drop_unusable_(g, work.scratch)
            p, watched = take_step_(g, states, total, decay, factor, work, scalars, options)
        del g, kept, work
        dtype = batch.params[0].dtype
        if dtype in (torch.bfloat16, torch.float16):
            p = stochastic_round(p, dtype, batch.dither())
        batch.write_weights(p)
        return watched

    def _tally(self, counts: list[Tensor]) -> None:
        for device in {count.device for count in counts}:
            # float32 would lose count at 2^24, which a few steps of nothing but NaN reach.
            more = torch.stack([c for c in counts if c.device == device]).sum(dtype=torch.int64)
            self._unusable[device] = self._unusable[device] + more if device in self._unusable else more

    def nonfinite_elements(self) -> int:
        """How many gradient elements were not finite, or above 1e18, and so counted as 0, in this process."""
        return sum(int(count.item()) for count in self._unusable.values())

    def _log_progress(self, number: int, batches: list[Batch]) -> None:
        """One line now and then, made of what is known without asking the device."""
        step = batches[0].traits.step
        if self._group_options[number].config.verbose and step % _VERBOSE_EVERY == 0:
            phase = self._phase(number, batches[0])
            name = "early" if phase.early else "warm-up" if phase.warmup else "after the warm-up"
            factor = self._scheduler_factor(number)
            logger.info("group %d, step %d: %s, scheduler factor %.3g", number, step, name, factor)

    # Learning rates ---------------------------------------------------------------------------------------------

    def _scheduler_factor(self, number: int) -> float:
        return self._group_options[number].scheduler_factor(self.param_groups[number])

    def _initial_lr(self, number: int) -> float:
        return self._group_options[number].initial_lr(self.param_groups[number])

    def _starting_lr(self, number: int) -> float:
        return self._group_options[number].starting_lr(self.param_groups[number])

    def get_lr_mask(self, p: Tensor) -> Tensor:
        """The learning-rate mask of a parameter.

        Returns:
            float32 of p's shape, a copy; before p's first step, what its first step will start from.

        Raises:
            ValueError: `p` is not a parameter of this optimizer.
        """
        for number, (group, options) in enumerate(zip(self.param_groups, self._group_options)):
            if any(p is other for other in group["params"]):
                if "step" not in self.state.get(p, {}):
                    return torch.full(p.shape, self._starting_lr(number), dtype=torch.float32, device=p.device)
                state = self.state[p]
                if "lr_mask" in state:
                    return state["lr_mask"].clone()
                return to_full("lr_mask", state, self._storage("lr_mask", p, options.config), p.shape)
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is not one of this optimizer's")

    def effective_learning_rates(self) -> list[tuple[float, float, float]]:
        """Mean, smallest and largest effective learning rate of each group; one read-back from the device in all.

        The effective learning rate of an element is its mask times the scheduler's factor, and for LoRA factors times
        ALLoRA's row scaling; in the contextual optimizers the mask counts times the multiplier. Before the first step
        of a group it is the group's learning rate.
        """
        return read([self])[0].learning_rates

    @torch.no_grad()
    def group_summaries(self) -> list[Tensor | float]:
        """What `effective_learning_rates` reads, for each group, while still on the device."""
        summaries = (self._summarize_lr(number) for number in range(len(self.param_groups)))
        return [
            float(group["lr"]) if summary is None else summary for group, summary in zip(self.param_groups, summaries)
        ]

    def context_summary(self) -> dict[str, Tensor]:
        """What drives a contextual optimizer, while still on the device; nothing in the others."""
        return self.c_optim.summary() if self._contextual else {}

    def _summarize_lr(self, number: int) -> Tensor | None:
        """(mean, smallest, largest) of a group on its device, or None before its first step."""
        batches = self._batches_with_state(number)
        if not batches:
            return None
        factor = self._scheduler_factor(number)
        sums, lows, highs, count = [], [], [], 0
        for batch in batches:
            mask, rows = self._mask_and_row_scaling(number, batch)
            scaling = lr_factor(factor, rows)
            if self._contextual:
                config = self._group_options[number].config
                mask = lr_mask.scaled(mask, self.c_optim.multiplier().to(mask.device), config.min_lr, config.max_lr)
            rates = mask * (1.0 if scaling is None else scaling)
            low, high = torch.aminmax(rates)
            sums.append(rates.sum())
            lows.append(low)
            highs.append(high)
            count += rates.numel()
        device = sums[0].device
        total, low, high = (torch.stack([x.to(device) for x in values]) for values in (sums, lows, highs))
        return torch.stack([total.sum() / count, low.amin(), high.amax()])

    def _mask_and_row_scaling(self, number: int, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The masks of a batch, (tensors, rows, columns), and ALLoRA's (tensors, rows, 1) where it applies."""
        mask = batch.states(self._bind(number, batch, reading=True)).read("lr_mask")
        eta = self._group_options[number].config.eta
        return mask, allora.row_scaling(batch.weights(), eta) if batch.traits.row_scaled else None

    def _get_group_lr(self, group: Mapping[str, Any]) -> float:
        """Mean effective learning rate of one of this optimizer's groups.

        Raises:
            ValueError: `group` is not an entry of `param_groups`.
        """
        for number, own in enumerate(self.param_groups):
            if own is group:
                return self.get_learning_rates()[number]
        raise ValueError("the group is not an entry of this optimizer's param_groups")

    def get_learning_rates(self) -> list[float]:
        """Mean effective learning rate of each group."""
        return [mean for mean, _, _ in self.effective_learning_rates()]

    def get_avg_learning_rate(self) -> float:
        """Mean over the groups of their mean effective learning rates."""
        rates = self.get_learning_rates()
        return sum(rates) / len(rates)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs, and the derived values that readers of a checkpoint expect.

        Returns:
            torch's layout with `magic_version` added; only tensors, numbers, strings, lists and dicts.
        """
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            saved = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks  # They are for all of it, below.
        derived = self._derived_values()
        checksums = self._state_checksums()
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved["state"] = {key: {**state, **derived.get(parameters[key], {})} for key, state in saved["state"].items()}
        context = self.c_optim.state_dict() if self._contextual else {}
        saved["param_groups"] = [
            checkpoint.sealed({
                **group,
                **options.config.as_dict(),
                "lr": float(group["lr"]),
                "initial_lr": self._initial_lr(number),
                **self._saved_names(number),
                "state_checksums": [checksums.get(p) for p in self.param_groups[number]["params"]],
                **(context if number == 0 else {}),
            })
            for number, (group, options) in enumerate(zip(saved["param_groups"], self._group_options))
        ]  # fmt: skip
        saved["magic_version"] = checkpoint.VERSION
        for post_hook in hooks.values():
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def _saved_names(self, number: int) -> dict[str, list[str]]:
        """The names of a group's parameters, '' where one is not known, as torch's own optimizers save them."""
        names = [self._names.get(p, "") for p in self.param_groups[number]["params"]]
        return {"param_names": names} if any(names) else {}

    @torch.no_grad()
    def _state_checksums(self) -> dict[Tensor, int]:
        """For each parameter with a state, the checksum of it; one read-back from the device in all."""
        sums: list[Tensor] = []
        owners: list[tuple[Tensor, str]] = []
        for number in range(len(self.param_groups)):
            for batch in self._batches_with_state(number):
                self._bind(number, batch, reading=True)
                for key, values in batch.tensor_sums().items():
                    sums.append(values)
                    owners += [(p, key) for p in batch.params]
        if not sums:
            return {}
        totals = torch.cat([values.to(sums[0].device) for values in sums]).tolist()
        known: dict[Tensor, dict[str, int]] = defaultdict(dict)
        for (p, key), total in zip(owners, totals):
            known[p][key] = total
        return {p: checksum(self.state[p], totals_of_p) for p, totals_of_p in known.items()}

    @torch.no_grad()
    def _derived_values(self) -> dict[Tensor, dict[str, Any]]:
        """For each parameter with a state: its mean learning rate, its group's largest, and its row scaling."""
        derived: dict[Tensor, dict[str, Any]] = {}
        means: list[Tensor] = []
        for number, group in enumerate(self.param_groups):
            largest = max(float(group["lr"]), self._initial_lr(number))
            for batch in self._batches_with_state(number):
                masks, rows = self._mask_and_row_scaling(number, batch)
                means += masks.mean(dim=(1, 2)).unbind()
                for index, p in enumerate(batch.params):
                    derived[p] = (
                        {"lr_max": largest} if rows is None else {"lr_max": largest, "row_scaling": rows[index]}
                    )
        if means:
            values = torch.stack([mean.to(means[0].device) for mean in means]).tolist()
            for p, value in zip(derived, values):
                derived[p]["avg_lr"] = value
        return derived

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a checkpoint. `lr` and `initial_lr` come from it, every other option stays the constructor's.

        Unlike torch's own, every state keeps its dtype: torch would cast it to the parameter's, and a learning-rate
        mask in bfloat16 no longer moves.

        Raises:
            ValueError: the checkpoint does not fit; it says which parameter and why. Nothing has changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        configs = [options.config for options in self._group_options]
        restored = checkpoint.restore(
            state_dict, self.param_groups, configs, self._names, self._storage, self._contextual
        )
        for note in restored.notes:
            logger.info("checkpoint: %s", note)
        for group, rates in zip(self.param_groups, restored.learning_rates):
            group.update(rates)
        self._losses = []  # They are of steps that the checkpoint knows nothing of.
        if self._contextual:
            self.c_optim.reset()
            if restored.context is not None:
                self.c_optim.load_state_dict(restored.context)
        self.__setstate__({"state": defaultdict(dict, restored.state), "param_groups": self.param_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("config", "_group_options", "_names", "_unusable", "_unquantizable", "_losses", "c_optim")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own if name in self.__dict__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_layout()

    # Batches and states -----------------------------------------------------------------------------------------

    def _batches(self, number: int, params: Iterable[Tensor]) -> list[Batch]:
        """The batches of some parameters of a group, which have taken a step."""
        factors = self._find_factors() if self._factors is None else self._factors
        scaled = set() if self._group_options[number].config.full_finetune else factors
        counts_of = [momentum_count(period) for period in self._momentum_scales(number)]
        members = []
        for p in params:
            state = self.state[p]
            has_polarity = "last_polarity" in state or "last_polarity_q" in state
            counts = tuple([state.get(count, 0) for count in counts_of])
            traits = Traits(state["step"], p in scaled, has_polarity, counts)
            members.append((self._positions[p], p, traits))
        # Momenta pass over a stack two dozen times more. Beside 8-bit states, which take most of the time, it is even.
        cached = bool(counts_of) and type(self)._choose_storage is full
        layout = self._layouts.setdefault(number, Layout(cached))
        batches, left_behind = layout.batches(members)
        for p in left_behind:
            # Its states are slices of buffers that nobody else needs any more.
            self.state[p].update((key, value.clone()) for key, value in self.state[p].items() if torch.is_tensor(value))
        return batches

    def _batches_with_state(self, number: int) -> list[Batch]:
        """The batches of all parameters of a group that have ever taken a step."""
        params = [p for p in self.param_groups[number]["params"] if "step" in self.state.get(p, {})]
        return self._batches(number, params) if params else []

    def _phase(self, number: int, batch: Batch) -> Phase:
        return Phase.at(batch.traits.step, self._group_options[number].config.warmup_steps)

    def _bind(self, number: int, batch: Batch, reading: bool = False) -> dict[str, Storage]:
        """Bind a batch to the states of its phase.

        Args:
            number: the group's.
            batch: the batch.
            reading: make no sign history that is not there; only a step may begin one.

        Returns:
            How each of these states is kept.
        """
        fills = {"lr_mask": self._starting_lr(number)}
        storages = self._storages(number, batch, reading)
        try:
            batch.bind(self.state, storages, fills)
        except RuntimeError as error:
            all_full = all(isinstance(storage, Full) for storage in storages.values())
            if all_full or isinstance(error, torch.cuda.OutOfMemoryError) or "memory" in str(error):
                raise
            reason = str(error).partition("\n")[0]
            shapes = ", ".join(sorted({str(tuple(p.shape)) for p in batch.params}))
            logger.warning("states of parameters of shape %s stay in 32 bits, quantizing failed: %s", shapes, reason)
            for p in batch.params:
                for name, storage in storages.items():
                    if name not in self.state[p] and is_kept(name, self.state[p], storage):
                        self.state[p][name] = to_full(name, self.state[p], storage, p.shape)
            self._unquantizable.update(batch.params)
            storages = self._storages(number, batch, reading)
            batch.bind(self.state, storages, fills)
        return storages

    def _storages(self, number: int, batch: Batch, reading: bool) -> dict[str, Storage]:
        """How each state that a batch has in its phase is kept: for hundreds of steps the same, so it is looked up."""
        phase = self._phase(number, batch)
        if reading and not batch.traits.has_polarity:
            phase = phase._replace(warmup=False)
        p = batch.params[0]
        kind = (number, phase, p.shape, p in self._unquantizable)
        if kind not in self._known_storages:
            config = self._group_options[number].config
            names = [*phase.state_names(config.came), *map(momentum_name, self._momentum_scales(number))]
            self._known_storages[kind] = {name: self._storage(name, p, config) for name in names}
        return self._known_storages[kind]

    def _storage(self, name: str, p: Tensor, config: OptimizerConfig) -> Storage:
        if p in self._unquantizable:
            return full(name, p.numel(), config)
        for period in config.momentum_scales:
            if name == momentum_name(period):
                return momentum_storages(config.momentum_scales, p.shape)[period]
        return type(self)._choose_storage(name, p.numel(), config)

    def _find_factors(self) -> set[Tensor]:
        groups = [group["params"] for group in self.param_groups]
        factors = lora.find_factors(groups, self._names)
        parameters = (p for group in groups for p in group)
        self._positions = {p: position for position, p in enumerate(parameters)}
        count, total = len(factors), len(self._positions)
        if (count, total) != self._factors_found:
            if factors:
                logger.info("%d of %d parameters are LoRA factors: ALLoRA is on, unless full_finetune", count, total)
            else:
                logger.info("none of %d parameters is a LoRA factor: ALLoRA is off", total)
        self._factors, self._factors_found = factors, (count, total)
        return factors

    def _start_layout(self) -> None:
        """Forget all that was made for the states there were before; they may be other tensors now."""
        self._layouts = {}
        self._compiler = Compiler()
        self._factors_found = None
        self._forget_layout()

    def _forget_layout(self) -> None:
        """Look at the parameters anew at the next step: their positions, and which are LoRA factors."""
        self._factors = None
        self._positions = {}
        self._sampler = None
        self._known_storages = {}
        self._workspace = Workspace()
        if self._contextual and self.__dict__.get("_group_options"):
            self._tell_bounds()
