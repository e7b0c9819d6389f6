#!/bin/bash
# lightning 2.6.6, torch 2.13.0.
#
# `Trainer(max_steps=4).fit(...)` with a loader of four batches stops on the last batch of the first epoch. A checkpoint
# that `save_checkpoint` writes then, resumed with max_steps=8, does not begin with the next epoch: Lightning first makes
# an epoch of a single batch, whose number is 4 although the loader has only 0 to 3, and counts it as an epoch. The data
# come one batch late from there on, and the fourth batch never, so the run does not end where an uninterrupted one does.
# The number of steps is right. A checkpoint of the same step that ModelCheckpoint writes resumes as one expects.
#
# (epoch, number of the batch, its content):
#   uninterrupted            (1, 0, 0) (1, 1, 1) (1, 2, 2) (1, 3, 3)
#   after save_checkpoint    (1, 4, 0) (2, 0, 0) (2, 1, 1) (2, 2, 2)
#   after ModelCheckpoint    (1, 0, 0) (1, 1, 1) (1, 2, 2) (1, 3, 3)
#
# Fails if any of the three changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0 lightning==2.6.6
cat > resume.py <<'PYTHON'
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, number):
        self.seen.append((self.current_epoch, number, int(batch[0, 0])))
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(steps, resume=None, callbacks=()):
    model, data = Model(), torch.utils.data.DataLoader(torch.arange(4.0)[:, None], batch_size=1)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=list(callbacks), enable_progress_bar=False,
        enable_checkpointing=bool(callbacks), enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=resume)
    return trainer, model.seen


_, straight = fit(8)
fit(4)[0].save_checkpoint("saved.ckpt")
_, after_saved = fit(8, "saved.ckpt")
fit(4, callbacks=[ModelCheckpoint(dirpath=".", filename="kept", every_n_train_steps=4)])
_, after_kept = fit(8, "kept.ckpt")
for name, seen in (("uninterrupted", straight[4:]), ("save_checkpoint", after_saved), ("ModelCheckpoint", after_kept)):
    print(name, *seen)
assert straight[4:] == [(1, 0, 0), (1, 1, 1), (1, 2, 2), (1, 3, 3)]
assert after_saved == [(1, 4, 0), (2, 0, 0), (2, 1, 1), (2, 2, 2)]
assert after_kept == straight[4:]
PYTHON
env/bin/python resume.py 2> log || { tail -5 log >&2; exit 1; }
