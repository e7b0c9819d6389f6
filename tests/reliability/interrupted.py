"""Interrupted saving: the embedded trainer, with real files, is killed at any point or runs out of disk space."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from library.cameamp_demo import files
from library.cameamp_demo.options import UserError, parse
from library.cameamp_demo.trainer import Trainer

# The events that Python reports to an audit hook when files change. torch's own writer reports none; killing at random
# times interrupts it.
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.scandir")


class Saver:
    """A trainer that saves its state in forked copies of this process, which may be killed.

    Args:
        output: an empty folder.
    """

    def __init__(self, output: Path) -> None:
        arguments = [
            "--embedded", "--output_dir", str(output), "--output_name", "a", "--max_train_steps", "100000",
            "--train_batch_size", "2", "--network_dim", "4", "--learning_rate", "1e-4", "--save_state",
            "--validate_every_n_steps", "0",
        ]  # fmt: skip
        self.trainer = Trainer(parse(arguments))
        self.state = output / "a-state"
        self.trainer._train_step()
        self.trainer._save_state("")

    def saved_step(self) -> int:
        """The step of the saved state, which must be complete."""
        folder = files.find_folder(self.state)
        assert folder is not None, "no state is left"
        files.check_folder(folder)
        return json.loads((folder / "progress.json").read_text())["step"]

    def resume(self) -> None:
        """Load the saved state as the trainer does."""
        assert _in_copy(lambda: self.trainer._load_state(self.state)) == 0, "the state can't be resumed from"

    def count_events(self) -> tuple[int, float]:
        """The number of events of a complete save, and its seconds."""
        read, write = os.pipe()

        def save() -> None:
            count = 0

            def hook(event: str, _arguments: tuple) -> None:
                nonlocal count
                count += event in _EVENTS

            sys.addaudithook(hook)
            start = time.perf_counter()
            self.trainer._save_state("")
            os.write(write, json.dumps([count, time.perf_counter() - start]).encode())

        assert _in_copy(save) == 0
        count, seconds = json.loads(os.read(read, 1000))
        os.close(read)
        os.close(write)
        return count, seconds

    def killed_at_event(self, number: int) -> None:
        """Save in a copy of this process that kills itself at the event of this number."""

        def save() -> None:
            count = 0

            def hook(event: str, _arguments: tuple) -> None:
                nonlocal count
                count += event in _EVENTS
                if count > number:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            self.trainer._save_state("")

        _in_copy(save)

    def killed_after(self, seconds: float) -> None:
        """Save in a copy of this process that is killed after a time."""
        child = _start(lambda: self.trainer._save_state(""))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def on_a_full_disk(self, largest: int) -> str:
        """Save with a limit to the size of a file, as on a full disk.

        Returns:
            The message to the user.
        """
        import resource

        read, write = os.pipe()

        def save() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            try:
                self.trainer._save_state("")
            except UserError as error:
                os.write(write, str(error).encode())

        assert _in_copy(save) == 0
        os.set_blocking(read, False)
        message = ""
        with contextlib.suppress(BlockingIOError):
            message = os.read(read, 10_000).decode()
        os.close(read)
        os.close(write)
        return message


def killed(output: Path, cases: int, seed: int = 0) -> Counter[str]:
    """Kill saving at `cases` points, one after the other in one folder; each finds what the one before left behind.

    Returns:
        How often the new state was there afterwards, and how often the state before it.
    """
    saver = Saver(output)
    events, seconds = saver.count_events()
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    last = saver.saved_step()
    for case in range(cases):
        saver.trainer._train_step()
        if case % 2:
            saver.killed_after(rng.uniform(0, 1.2 * seconds))
        else:
            saver.killed_at_event(rng.randrange(events))
        found = saver.saved_step()
        assert found in (last, saver.trainer.step), f"case {case}: the state of step {found} is neither of the two"
        outcomes["the state before is there" if found == last else "the new state is there"] += 1
        last = found
        if case % 10 == 0:
            saver.resume()
    return outcomes


def full_disk(output: Path, cases: int, seed: int = 0) -> list[str]:
    """Save on a disk that is full after some bytes of a file: none, one too few, and random numbers between.

    Returns:
        The message to the user, for each case.
    """
    saver = Saver(output)
    largest = max(path.stat().st_size for path in saver.state.iterdir())
    rng = random.Random(seed)
    messages = []
    for limit in [0, largest - 1, *(rng.randrange(largest) for _ in range(cases - 2))]:
        step = saver.saved_step()
        saver.trainer._train_step()
        message = saver.on_a_full_disk(limit)
        assert message.startswith(f"cannot save {saver.state}: "), f"limit {limit}: {message!r}"
        assert "\n" not in message
        assert saver.saved_step() == step
        assert not files.beside(saver.state).exists()
        messages.append(message)
    saver.resume()
    return messages


def _start(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2)
        work()
        status = 0
    finally:
        os._exit(status)


def _in_copy(work: Callable[[], object]) -> int:
    """Run a function in a copy of this process. Returns its exit status, or minus the signal that ended it."""
    _, status = os.waitpid(_start(work), 0)
    return os.waitstatus_to_exitcode(status)
