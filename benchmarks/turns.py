"""Two programs that take turns: each in a process of its own, one at work at a time, so that noise hits both alike."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def report(turn: Connection, value: Any) -> None:
    turn.send((0.0, value))


def timed(turn: Connection, work: Callable[[], Any]) -> None:
    """Wait for the turn, work, report how long it took and what came out."""
    turn.recv()
    start = time.perf_counter()
    result = work()
    turn.send((time.perf_counter() - start, result))


def trainer_options(dtype: str, device: str) -> dict[str, Any]:
    """Of a transformers `Trainer` that takes turns: one epoch in the data's order, a log line a step, nothing else."""
    return {
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "bf16": dtype == "bfloat16",
        "use_cpu": device == "cpu",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def turns_of_trainer(turn: Connection) -> Any:
    """A callback for a transformers `Trainer` that logs every step: it hands the turn back after each.

    A step's time runs from the moment this side gets its turn to the end of the optimiser step; its loss is reported.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn.recv()
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            turn.send((time.perf_counter() - self.started, float(logs["loss"])))
            if state.global_step < state.max_steps:
                turn.recv()
                self.started = time.perf_counter()

    return Turns()


class Side:
    """The other end of a worker process."""

    def __init__(self, target: Callable[[Any, Connection], None], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.turn, theirs = context.Pipe()
        # With the program, not after it: a side that waits for its turn would keep a failed program alive.
        self.process = context.Process(target=target, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.why = self.turn.recv()[1]

    def go(self) -> tuple[float, Any]:
        self.turn.send(None)
        return self.turn.recv()

    def finish(self) -> dict[str, float]:
        found = self.go()[1]
        self.process.join()
        return found
