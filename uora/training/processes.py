"""What the processes of one run tell each other; alone, a process tells itself.

Under ``torchrun``, or once they have joined, every process has the whole model, unless it is sharded
(``uora.training.sharding``), and reads all rows in the same order; of each batch it takes each ``world_size()``-th.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import distributed

from uora.models import Batch
from uora.training.loss import MeterT
from uora.training.observer import Evaluation, StepMetrics, TrainingObserver

T = TypeVar("T")


def join(meeting: Path, *, rank: int, of: int) -> None:
    """What ``torchrun`` does otherwise, for processes of one machine: let them find each other.

    They meet at a file and talk within the machine, so that none listens to the network. Called in each of them before
    `uora.training.train`; returns when all have.

    Args:
        meeting: a file in an existing folder; there is none before the first of them comes.
        rank: this process's number, from 0.
        of: how many there are, at least two.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(of),
        "LOCAL_WORLD_SIZE": str(of),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # accelerate would choose again
    }
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, init_method=meeting.as_uri(), rank=rank, world_size=of)


def local_rank() -> int:
    """This process's number on its machine: the device it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched() -> int:
    """How many processes were started together; they may not have found each other yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized())


def rank() -> int:
    """This process's number, from 0."""
    return 0 if _is_alone() else distributed.get_rank()


def world_size() -> int:
    """The number of processes."""
    return 1 if _is_alone() else distributed.get_world_size()


def from_first(value: T) -> T:
    """The first process's value, in all of them."""
    if _is_alone():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    if _is_alone():
        return number
    numbers = [number] * world_size()
    distributed.all_gather_object(numbers, number)
    return max(numbers)


def merged(meter: MeterT) -> MeterT:
    """What the meters of all processes saw, in one; the same in every process."""
    if _is_alone():
        return meter
    meters: list[MeterT | None] = [None] * world_size()
    distributed.all_gather_object(meters, meter)
    first, *others = cast(list[MeterT], meters)
    for other in others:
        first.merge(other)
    return first


def own_rows(batch: Batch) -> Batch:
    """This process's rows of a batch that all processes have."""
    size = world_size()
    return batch if size == 1 else {name: tensor[rank() :: size] for name, tensor in batch.items()}


class FirstProcessObserver:
    """Tells the caller's observer of the first process alone, and all processes its answer."""

    def __init__(self, observer: TrainingObserver) -> None:
        self._observer = observer

    def on_start(self, total_steps: int) -> None:
        """In the first process."""
        if rank() == 0:
            self._observer.on_start(total_steps)

    def on_step(self, metrics: StepMetrics) -> None:
        """In the first process."""
        if rank() == 0:
            self._observer.on_step(metrics)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """In the first process."""
        if rank() == 0:
            self._observer.on_evaluation(evaluation)

    def on_state(self, step: int, state: bytes) -> None:
        """In the first process."""
        if rank() == 0:
            self._observer.on_state(step, state)

    def should_stop(self) -> bool:
        """The first process's answer."""
        return from_first(rank() == 0 and self._observer.should_stop())
