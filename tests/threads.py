"""Threads that stand for processes, where what is exchanged between them is all that matters."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch


class World:
    """Collective calls of threads, as `torch.distributed` and accelerate have them."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=20), [None] * size
        self.of_thread = threading.local()

    @property
    def rank(self) -> int:
        return self.of_thread.rank

    def all(self, value: Any) -> list[Any]:
        """What every thread has given."""
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def gather_object(self, objects: list[Any]) -> list[Any]:
        return [found for of_rank in self.all(objects) for found in of_rank]

    def broadcast_object_list(self, objects: list[Any]) -> list[Any]:
        return list(self.all(objects)[0])

    def all_to_all_single(self, output, given, output_sizes, input_sizes) -> None:
        of_ranks = self.all(given.split(input_sizes))
        pieces = [pieces[self.rank] for pieces in of_ranks]
        assert [len(piece) for piece in pieces] == output_sizes
        output.copy_(torch.cat(pieces))

    def run(self, function: Callable[[SimpleNamespace], Any]) -> list[Any]:
        """What it returns on each rank, of which it is given the accelerator."""

        def on(rank):
            self.of_thread.rank = rank
            return function(
                SimpleNamespace(
                    process_index=rank,
                    num_processes=self.size,
                    is_main_process=rank == 0,
                    device=torch.device("cpu"),
                    gather=lambda tensor: torch.cat(self.all(tensor)),
                )
            )

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))
