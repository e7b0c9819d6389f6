"""Section by section, what one step of Automagic_CameAMP does: one parameter at a time, written to be read.

This is a second implementation, kept apart from the product's on purpose: no stacks, no in-place updates, no shared
code. Slow and plain; the tests hold the product against it.
"""

from __future__ import annotations

import math

import torch


class ReferenceCameAMP:
    """The 32-bit optimizer for float32 parameters.

    Args:
        groups: for each group, a dict of `params` and any option that differs from `options`.
        lora: whether the matrices are LoRA factors.
        options: as in OptimizerConfig.
    """

    # Whether parameters are stepped one by one, inside the backward pass.
    one_by_one = False

    def __init__(self, groups, lora, **options):
        self.options = {
            "lr": 1e-6, "min_lr": 1e-7, "max_lr": 1e-3, "lr_bump": 3e-6, "eps": (1e-30, 1e-16, 1e-8),
            "clip_threshold": 1.0, "betas": (0.8, 0.99, 0.999), "eta": 2.0, "beta1_decay": 0.9995,
            "weight_decay": 5e-4, "warmup_steps": 500, "came": True, "full_finetune": False, "cautious": False,
            "factored": False,
            "bias_correction": False,
            "momentum_scales": (), **options,
        }  # fmt: skip
        self.groups = [{**self.options, **group} for group in groups]
        self.lora = lora
        self.state = {}
        self.scale = [1.0] * len(groups)  # group["lr"] / initial lr, as a scheduler sets it
        self.multiplier = 1.0  # C-Optim's

    def step(self):
        for group, scale in zip(self.groups, self.scale):
            with_grad = [p for p in group["params"] if p.grad is not None]
            if with_grad:
                usable = {p: self.usable(p.grad) for p in with_grad}
                everything = torch.cat([g.flatten() for g in usable.values()]).abs()
                for p in with_grad:
                    # One by one the gradients of this step are not known; at the first one there are none before.
                    before = group.get("before", usable[p].abs().flatten()) if self.one_by_one else everything
                    self.step_parameter(p, usable[p], before, group, scale)
                group["before"] = everything

    @staticmethod
    def usable(g):
        g = g.float()
        return torch.where(g.isfinite() & (g.abs() <= 1e18), g, torch.zeros_like(g))

    def step_parameter(self, p, g, group_abs, o, scale):
        rows = p.shape[0] if p.ndim else 1
        g = g.reshape(rows, -1)
        w = p.detach().float().reshape(rows, -1)
        st = self.state.setdefault(p, self.fresh(w, o))
        st["step"] += 1
        t = st["step"]
        early, warmup = t < o["warmup_steps"] / 2, t < o["warmup_steps"]
        eps1, eps2, _ = o["eps"]
        b1, b2, b3 = o["betas"]

        # 1. AGR
        # The sum of the step before may be below the parameter's own.
        alone = max((group_abs != 0).sum(), (g != 0).sum()) < 2
        grad = g if alone else g * (1 - g.abs() / max(group_abs.sum(), g.abs().sum()))

        # 2. CAME
        if o["came"]:
            v = b2 * st["exp_avg_sq"] + (1 - b2) * (grad**2 + eps1)
            sg = grad / v.sqrt()
            st["exp_avg_sq"] = self.kept(v, p, o)
            sg = sg / max(1.0, (sg**2).mean().sqrt().item() / o["clip_threshold"])
        else:
            sg = grad.clamp(-(t**0.25), t**0.25)

        # C-Optim: multi-scale momentum
        drive = self.drive(sg, st, t, o)

        # 3. Momentum
        if early:
            colnorm = lambda x: (x**2).sum(dim=0, keepdim=True).sqrt().clamp(min=1e-12)
            m = st["exp_avg"]
            st["s"] = 0.9 * st["s"] + 0.1 * (m / colnorm(m)) * (drive / colnorm(drive))
            st["exp_avg"] = 0.9 * m + ((1 + st["s"]) / 2 + eps1) * drive
            bar = st["exp_avg"]
        else:
            b1_t = max(b1 * o["beta1_decay"] ** t, 0.4)
            st["exp_avg"] = b1_t * st["exp_avg"] + (1 - b1_t) * drive
            bar = b1 * st["exp_avg"] + (1 - b1) * drive

        # 4. AdaBelief
        v = b3 * st["exp_avg_res"] + (1 - b3) * ((sg - bar) ** 2 + eps2)
        seen = 1 - b3**t if o["bias_correction"] else 1
        u = (st["exp_avg"] / (v / seen).sqrt()).clamp(-10, 10)
        st["exp_avg_res"] = self.kept(v, p, o)

        # 5. Grams
        a = o["beta1_decay"] ** t
        u = a * u.abs() * grad.sign() + (1 - a) * u

        # 6. Orthogonal gradient
        if early and w.numel() > 1 and w.norm() > 1e-30:
            across = u - (u * w).sum() / w.norm() ** 2 * w
            u = across * (u.norm() / across.norm()) if across.norm() > 0 else across

        # 7. Learning-rate mask
        if warmup:
            polarity = grad > 0
            if t > 1:
                moved = torch.where(polarity == st["last_polarity"], o["lr_bump"], -o["lr_bump"])
                st["lr_mask"] = (st["lr_mask"] + moved).clamp(o["min_lr"], max(o["max_lr"], o["lr"]))
            st["last_polarity"] = polarity
        lr = st["lr_mask"] * self.multiplier * scale

        # Cautious
        if o["cautious"]:
            agrees = (u * grad > 0).float()
            u = u * agrees * (u.numel() / (agrees.sum() + 1))

        # 8. ALLoRA
        if self.lora and not o["full_finetune"] and p.ndim >= 2:
            lr = lr / (w.norm(dim=1, keepdim=True) + 1 / o["eta"] ** 2).sqrt()

        # 9. Adaptive weight decay
        if early and o["weight_decay"] > 0:
            std = group_abs.std(unbiased=False).item()
            z = (g.abs().mean().item() - group_abs.mean().item()) / std if std > 0 else 0.0
            theta = 2 / (1 + math.exp(-4 * z))
            w = w * (1 - lr * o["weight_decay"] * theta)

        # 10. Step
        w = w - lr * u
        st["sg"], st["change"] = sg, p.detach().float().reshape(rows, -1) - w
        st["exact"] = w.reshape(p.shape)
        p.data.copy_(st["exact"])

    @staticmethod
    def kept(v, p, o):
        """A mean of squares as it is kept: of all but vectors, if factored, the means of rows and columns."""
        if not o["factored"] or p.ndim < 2:
            return v
        return v.mean(dim=1, keepdim=True) * (v.mean(dim=0, keepdim=True) / v.mean())

    @staticmethod
    def drive(sg, st, t, o):
        """The weighted mean of the debiased momenta, over those updated so far; sg while there are none."""
        total, weights = torch.zeros_like(sg), 0.0
        for period in o["momentum_scales"]:
            name = f"momentum_scale_{period}"
            st.setdefault(name, torch.zeros_like(sg))
            if t % period == 0:
                st[name] = 0.9 * st[name] + 0.1 * sg
            if t >= period:
                total = total + st[name] / (1 - 0.9 ** (t // period)) / period
                weights += 1 / period
        # An element whose gradient is exactly 0 is not driven.
        return torch.where(sg == 0, torch.zeros_like(sg), total / weights) if weights else sg

    @staticmethod
    def fresh(w, o):
        zeros = torch.zeros_like(w)
        return {
            "step": 0, "exp_avg": zeros, "exp_avg_sq": zeros, "exp_avg_res": zeros, "s": zeros,
            "lr_mask": torch.full_like(w, min(max(o["lr"], o["min_lr"]), max(o["max_lr"], o["lr"]))),
        }  # fmt: skip


class ReferenceCOptim(ReferenceCameAMP):
    """The contextual optimizer, without edge cases, for models of which every element is in the sample."""

    def __init__(self, groups, lora, **options):
        super().__init__(groups, lora, **{"momentum_scales": (1, 5, 10, 25), "adaptation_rate": 0.1, **options})
        self.largest = max(group["lr"] for group in self.groups)
        self.highest = 10 * max(max(group["max_lr"], group["lr"]) for group in self.groups) / self.largest
        self.multiplier = min(1.0, 1e-6 / self.largest)
        self.course = None
        self.length = self.top = self.square = 0.0
        self.steps = 0

    def step(self):
        for group in self.groups:
            for p in group["params"]:
                self.state.get(p, {}).pop("change", None)
        used = self.multiplier * self.largest * max(self.scale)
        super().step()
        params = [p for group in self.groups for p in group["params"]]
        # A parameter without a gradient counts as 0 on both sides.
        gather = lambda name: torch.cat([self.seen(p, name) for p in params])
        change = gather("change")
        self.top = max(self.top, max(self.scale))
        if self.course is not None:
            alignment = torch.cosine_similarity(self.course, gather("sg"), dim=0, eps=1e-30).item()
            rate = self.options["adaptation_rate"] * (max(self.scale) / self.top) ** 3
            gain = 30 * rate * (1 + 2 * 10 / (10 + self.steps))
            if max(self.scale) < self.top:
                gain *= (60 / (60 + self.steps)) ** 2
            self.square += max(0.1, 1 / self.steps) * (alignment**2 - self.square)
            pace = 6 * rate * max(1 - self.steps / 40, 0)
            paced = self.square and (alignment > 0 or used > 1.001e-6)
            strength = max(gain, pace / math.sqrt(self.square) if paced else 0.0)
            self.multiplier *= math.exp(min(strength * alignment, 0.6))
        if change.any():
            length = change.square().mean().sqrt().item() / used
            self.multiplier *= self.length / length if self.length else 1.0
            self.length = length
        self.multiplier = max(self.multiplier, 1e-9)
        if self.length:
            self.multiplier = min(self.multiplier, self.highest / self.length)
        kept = min(0.97, 1 - 1 / (2 + self.steps / 4))
        self.steps += 1
        before = torch.zeros_like(change) if self.course is None else self.course
        direction = change / change.square().mean().sqrt() if change.any() else change
        self.course = (kept * before + direction).bfloat16().float()

    def seen(self, p, name):
        state = self.state.get(p, {})
        return state[name].flatten() if "change" in state else torch.zeros(p.numel())
