"""The processes of a run: one alone, or several that make each clip together by sharing the passes of its steps."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class OneProcess:
    """A process that makes its clips alone."""

    # Whether the passes of a step are shared with other processes, which then make the same clips.
    shares_passes = False
    # Whether it is for this process to write files and to say what is done.
    is_first = True

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process; for what would differ between them, as random seeds do."""
        return make()

    def failure(self, error: Exception | None) -> Exception | None:
        """The error of this process, or that another one had, so that all of them go on with the same clips."""
        return error


class GuidanceProcesses(OneProcess):
    """The processes of a launcher that make each clip together, within [`guidance_processes`]."""

    shares_passes = True

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return dist.get_rank() == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """
        As [`OneProcess.from_first`].

        Raises:
            ValueError: `make` has failed in the first process.
        """
        made, failure = [None, None], None
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:
                failure, made[1] = error, str(error)
        dist.broadcast_object_list(made)
        if failure is not None:
            raise failure
        if made[1] is not None:
            raise ValueError(made[1])
        return made[0]

    def failure(self, error: Exception | None) -> Exception | None:
        """As [`OneProcess.failure`]."""
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, None if error is None else str(error) or type(error).__name__)
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if error is not None or not failed:
            return error
        return RuntimeError(f"Process {failed[0]} failed: {texts[failed[0]]}")


@contextmanager
def guidance_processes(device: torch.device) -> Iterator[GuidanceProcesses]:
    """
    Joins the processes that `torchrun` or `accelerate launch` has started, for the length of a `with` block.

    Args:
        device (`torch.device`): That of this process.

    Raises:
        ValueError: No launcher has started this process.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "`guidance_parallel` shares the passes of a step among processes, and this is the only one; start it with "
            "torchrun or accelerate launch."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Seeds and messages go through main memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield GuidanceProcesses()
    finally:
        dist.destroy_process_group()
