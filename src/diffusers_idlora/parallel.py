"""Guidance parallelism: the passes of a step, shared among the processes of a distributed group."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from diffusers import LTX2VideoTransformer3DModel

from .guidance import GuidancePass


Predictions = Mapping[GuidancePass, tuple[torch.Tensor, torch.Tensor]]


def check_parallelism(transformer: LTX2VideoTransformer3DModel) -> None:
    """Raises a ValueError if diffusers' context parallelism is on, which splits nothing of the audio of LTX-2."""
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    for holder in (transformer, *processors):
        config = getattr(holder, "_parallel_config", None)
        if config is not None and config.context_parallel_config is not None:
            raise ValueError(
                f"`transformer` has diffusers' context parallelism enabled ({config.context_parallel_config}), which"
                " does not work for LTX-2; load it without, and share the guidance passes among the processes with"
                " guidance parallelism instead."
            )


def guidance_group(transformer: LTX2VideoTransformer3DModel) -> "GuidanceParallel":
    """
    Guidance parallelism over all processes.

    Args:
        transformer (`LTX2VideoTransformer3DModel`): This process's copy of the model.

    Raises:
        ValueError: `torch.distributed` is not initialised, or the model is itself split by context parallelism.
    """
    check_parallelism(transformer)
    return GuidanceParallel()


class GuidanceParallel:
    """
    Shares the passes of a step among the processes of a group. Each process has the whole model, runs its share, and
    gets the predictions of all, so that every process takes the same step. All of them have to make the same calls.

    Args:
        group (`torch.distributed.ProcessGroup`, *optional*): The processes; all of them if left out.

    Raises:
        ValueError: `torch.distributed` is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "`guidance_parallel` needs processes that know of each other, and `torch.distributed` is not"
                " initialised; start them with `torchrun` or `accelerate launch` and call"
                " `torch.distributed.init_process_group()` first."
            )
        self.group = group

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def num_processes(self) -> int:
        """How many processes share the passes."""
        return dist.get_world_size(self.group)

    def same_everywhere(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        The first process's tensor, on all of them; for what each would otherwise draw at random.

        Args:
            tensor (`torch.Tensor`): Of the same shape and dtype in every process.
        """
        shared = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(shared, group=self.group, group_src=0)
        return shared

    def predict(
        self,
        units: Sequence[tuple[GuidancePass, ...]],
        run: Callable[[Sequence[tuple[GuidancePass, ...]]], Predictions],
        video: torch.Tensor,
        audio: torch.Tensor,
    ) -> Predictions:
        """
        Args:
            units (`Sequence[tuple[GuidancePass, ...]]`): The step's passes; those of one unit stay in one process.
            run (`Callable`): Runs some of the units, and gives the video and audio x0 of each of their passes.
            video (`torch.Tensor`), audio (`torch.Tensor`): Tensors of the shapes and on the device of the predictions.

        Returns:
            `dict[GuidancePass, tuple[torch.Tensor, torch.Tensor]]`: Of all passes, float32, the same in every process.

        Raises:
            RuntimeError: Passes failed in another process. An error of this one is raised as it is, once the others
                know, so that none of them waits for ever.
        """
        # Made before anything can fail for want of memory.
        failed = torch.zeros(self.num_processes, dtype=torch.int32, device=video.device)
        own, failure = {}, None
        try:
            own = run(units[self.rank :: self.num_processes])
        except Exception as error:
            failure = error
            failed[self.rank] = 1
        dist.all_reduce(failed, group=self.group)
        if failure is not None:
            raise failure
        if failed.any():
            raise RuntimeError(
                f"Passes of guidance failed in process {failed.nonzero().flatten().tolist()} of the group; see there."
            )
        return {
            item: (
                self._from_owner(index % self.num_processes, own.get(item, (video, audio))[0]),
                self._from_owner(index % self.num_processes, own.get(item, (video, audio))[1]),
            )
            for index, unit in enumerate(units)
            for item in unit
        }

    def _from_owner(self, owner: int, tensor: torch.Tensor) -> torch.Tensor:
        """The owner's tensor in every process; in the others only the shape counts."""
        shared = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        dist.broadcast(shared, group=self.group, group_src=owner)
        return shared
