"""The optimizers in the loops of diffusers with peft, transformers and Lightning: small models, random weights.

Each library that is not installed skips its tests.
"""

from __future__ import annotations

import logging

import pytest
import torch

import library.automagic_cameamp as family
from library.cameamp.command_line import OWN_OPTIMIZERS

OPTIONS = {"lr": 1e-4, "warmup_steps": 5}


def optimizer_of(name, params, **more):
    options = {"momentum_scales": (1, 2, 3)} if "COptim" in name else {}
    return getattr(family, name)(params, **OPTIONS, **options, **more)


def assert_same(first, second, moved_from):
    """Two dictionaries of tensors are equal, and not what they were."""
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []
    assert any(not torch.equal(value, moved_from[key]) for key, value in first.items()), "nothing was trained"


def weights(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


# diffusers with peft --------------------------------------------------------------------------------------------------


class UNetWithLora:
    """diffusers' loop for LoRAs: a U-Net with an adapter of peft, through accelerate."""

    def __init__(self, name, named=False, **lora):
        accelerate, diffusers, peft = map(pytest.importorskip, ("accelerate", "diffusers", "peft"))
        from diffusers.optimization import get_scheduler

        torch.manual_seed(3)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
        ).requires_grad_(False)  # fmt: skip
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(
            peft.LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers, **lora)
        )
        trained = [(key, p) for key, p in unet.named_parameters() if p.requires_grad]
        self.own = optimizer_of(name, trained if named else [p for _, p in trained])
        schedule = get_scheduler("cosine", self.own, num_warmup_steps=2, num_training_steps=20)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet, self.own, schedule)
        self.noise_schedule = diffusers.DDPMScheduler()
        self.params = [p for _, p in trained]

    def run(self, first, last):
        for number in range(2 * first, 2 * last):  # two batches a step
            generator = torch.Generator().manual_seed(number)
            latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
            text = torch.randn(2, 5, 32, generator=generator)
            times = torch.randint(1000, (2,), generator=generator)
            with self.accelerator.accumulate(self.unet):
                noisy = self.noise_schedule.add_noise(latents, noise, times)
                loss = torch.nn.functional.mse_loss(self.unet(noisy, times, text).sample, noise)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.params, 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_diffusers_with_peft_resumes_bit_for_bit(name, kind, tmp_path):
    straight = UNetWithLora(name, **kind)
    start = weights(straight.unet)
    straight.run(0, 3).accelerator.save_state(str(tmp_path))
    straight.run(3, 7)
    resumed = UNetWithLora(name, **kind)
    resumed.accelerator.load_state(str(tmp_path))
    assert_same(weights(straight.unet), weights(resumed.run(3, 7).unet), moved_from=start)


@pytest.mark.parametrize(
    ("kind", "named", "recognized"),
    [
        ({}, False, True),
        ({"use_rslora": True}, False, True),
        ({"use_dora": True}, True, True),
        ({"use_dora": True}, False, False),  # its vectors of magnitudes hide the pairs from an optimizer without names
    ],
)
def test_factors_of_peft_are_recognized(kind, named, recognized, caplog):
    caplog.set_level(logging.INFO, "library")
    run = UNetWithLora("Automagic_CameAMP", named, **kind).run(0, 1)
    matrices = {p for p in run.params if p.ndim == 2}
    assert len(matrices) == 64
    assert run.own._parameters.factors == (matrices if recognized else set())
    assert ("ALLoRA is on" if recognized else "ALLoRA is off (vectors beside low-rank pairs") in caplog.text


# transformers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_transformers_trainer_resumes_bit_for_bit(name, tmp_path):
    transformers, peft = map(pytest.importorskip, ("transformers", "peft"))

    def trainer():
        torch.manual_seed(3)
        sizes = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=60, n_positions=16)
        model = transformers.GPT2LMHeadModel(sizes)
        lora = peft.LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, lora)
        ids = torch.randint(60, (20, 16), generator=torch.Generator().manual_seed(1))
        optimizer = optimizer_of(name, [p for p in model.parameters() if p.requires_grad])
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 10)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=8, save_steps=4, report_to="none",
            use_cpu=True, disable_tqdm=True, seed=5,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in ids]
        return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))

    straight = trainer()
    start = weights(straight.model)
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights(straight.model), weights(resumed.model), moved_from=start)
    own = resumed.optimizer.optimizer
    assert {state["step"] for state in own.state.values()} == {8}
    assert len(own._parameters.factors) == 8


# Lightning ------------------------------------------------------------------------------------------------------------


def lightning_run(kind, name, folder, epochs, resume=None):
    """A model trained by Lightning for some epochs of four batches; where it started, ended, and its checkpoint."""
    lightning = pytest.importorskip("lightning")

    class Automatic(lightning.LightningModule):
        """One optimizer, whose step gets a closure."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def loss(self, batch):
            return (self.second(torch.tanh(self.first(batch))) - batch).square().mean()

        def training_step(self, batch, number):
            return self.loss(batch)

        def configure_optimizers(self):
            optimizer = optimizer_of(name, self.named_parameters())
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class TwoOptimizers(Automatic):
        """With two Lightning asks for optimization by hand."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, number):
            for optimizer in self.optimizers():
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.report_loss(loss.detach())
                optimizer.step()

        def configure_optimizers(self):
            return [optimizer_of(name, part.named_parameters()) for part in (self.first, self.second)]

    torch.manual_seed(4)
    batches = torch.utils.data.DataLoader(torch.randn(16, 64), batch_size=4)
    model = {"automatic": Automatic, "two": TwoOptimizers}[kind]()
    start = weights(model)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, batches, ckpt_path=resume)
    checkpoint = folder / "last.ckpt"
    trainer.save_checkpoint(checkpoint)
    return start, weights(model), trainer.optimizers, checkpoint


@pytest.mark.parametrize("kind", ["automatic", "two"])
@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_lightning_resumes_bit_for_bit(name, kind, tmp_path):
    for folder in ("straight", "resumed"):
        (tmp_path / folder).mkdir()
    start, straight, optimizers, _ = lightning_run(kind, name, tmp_path / "straight", 2)
    *_, half = lightning_run(kind, name, tmp_path / "resumed", 1)
    _, resumed, again, _ = lightning_run(kind, name, tmp_path / "resumed", 2, half)
    assert_same(straight, resumed, moved_from=start)
    assert len(optimizers) == (2 if kind == "two" else 1)
    for first, second in zip(optimizers, again):
        assert {state["step"] for state in second.state.values()} == {8}
        if "COptim" in name:
            assert len(first.c_optim.loss_history) == 8
            assert first.c_optim.loss_history == second.c_optim.loss_history
