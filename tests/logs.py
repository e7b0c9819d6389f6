"""Reading back what a run has logged."""

from __future__ import annotations

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_scalars(folder):
    """The scalars of the one run below a folder: {tag: [(step, value), ...]}."""
    (events,) = folder.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
