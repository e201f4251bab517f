"""One process or several: who takes which batch, how gradients meet, what happens when one of them dies."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor, nn

from niwaki.errors import InputError, MissingExtraError, ProcessLostError
from niwaki.graph.skeleton import copy_with, like, walk
from niwaki.train.state import put_whole, whole_state
from niwaki.train.untouched import prepared
from niwaki.units import device_of

LAUNCHED = ("ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE")
"""What `accelerate launch` and torchrun set: where one of these is there, accelerate decides on the device."""
PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""
LONG = timedelta(days=7)
"""How long others wait for what the first one does alone: measuring may take long. A dead one is noticed at once."""
LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|nccl|peer|socket", re.IGNORECASE)
"""What backends say when another process is gone."""
SHARD = 1_000_000
"""Parameters from which on a module is gathered by itself under FSDP2, unless FSDP_MIN_NUM_PARAMS says another number;
what is smaller travels with the module around it."""


@final
class Processes:
    """The processes that train together, as accelerate finds them; one, unless something launched more.

    Raises:
        MissingExtraError: accelerate is not installed.
        InputError: FSDP in its first version was asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
            from accelerate.state import AcceleratorState
        except ImportError as cause:
            raise MissingExtraError("training needs accelerate", do='pip install "niwaki[train]"') from cause
        launched = any(name in os.environ for name in LAUNCHED)
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise InputError("train with FSDP", found="its first version", do="give accelerate --fsdp_version 2")
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.precision = asked if asked in ("bf16", "fp16") else "fp32"
        """As the launcher asks for; autocast is ours."""
        with _hidden("ACCELERATE_USE_FSDP"):  # shards are ours, too: accelerate makes none on CPUs
            self.accelerator = Accelerator(
                device_placement=launched,
                mixed_precision=None if AcceleratorState._shared_state else "no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        self.device: torch.device = self.accelerator.device if launched else device_of(model)
        self.count: int = self.accelerator.num_processes
        self.number: int = self.accelerator.process_index
        self.main: bool = self.accelerator.is_main_process
        self.sharded = self.sharded and self.count > 1

    @contextmanager
    def joined(self, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Inside, the module to call, and the one that holds the trained weights; afterwards `model` has these, the
        same in every process.
        """
        self.same(model)
        if self.sharded:
            bare = shard(copy_with(model, _own).to(self.device), self.count)
            yield bare, bare
            put_whole(model, {name: tensor.to(device_of(model)) for name, tensor in whole_state(bare).items()})
        else:
            model.to(self.device)
            with prepared(self.accelerator, model) as called:
                yield called, model
        self.same(model)

    def unsynced(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Inside, gradients of several processes do not meet, unless this is the last batch of a step."""
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last or self.count == 1 else self.accelerator.no_sync(model)

    @torch.no_grad()
    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Mean over the processes of gradients that nothing else brings together."""
        for parameter in parameters if self.count > 1 else ():
            if parameter.grad is not None:
                parameter.grad.copy_(self.mean(parameter.grad))

    def mean(self, tensor: Tensor) -> Tensor:
        """Over the processes."""
        return self.accelerator.reduce(tensor, reduction="mean") if self.count > 1 else tensor

    def all(self, tensor: Tensor) -> Tensor:
        """[processes, ...]: the tensors of all processes, on the CPU."""
        if self.count == 1:
            return tensor[None].cpu()
        return self.accelerator.gather(tensor[None].to(self.device)).cpu()

    def agreed(self, value: float) -> float:
        """The first process's number."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast

        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(broadcast(told, from_process=0))

    @torch.no_grad()
    def same(self, model: nn.Module) -> None:
        """Give every process the first one's weights and buffers."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in model.state_dict().values():
            tensor.copy_(broadcast(tensor.to(self.device), from_process=0))

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def told(self, make: Callable[[], str]) -> str:
        """What `make` gives in the first process; the others wait for it, however long it takes, and make nothing.

        Raises:
            ProcessLostError: in the others, where the first one failed or is gone.
        """
        if self.count == 1:
            return make()
        from torch.distributed import destroy_process_group, new_group

        # of its own: the usual group gives up after PATIENCE, and on GPUs its messages are not the CPU's
        group: Any = new_group(backend="gloo", timeout=LONG)
        try:
            return self._told(make, group)
        finally:
            destroy_process_group(group)

    def _told(self, make: Callable[[], str], group: Any) -> str:
        from torch.distributed import broadcast

        def send(content: bytes) -> bytes:
            size = torch.tensor([len(content)])
            broadcast(size, src=0, group=group)
            data = torch.zeros(int(size), dtype=torch.uint8)
            if self.main:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            broadcast(data, src=0, group=group)
            return bytes(data.tolist())

        if not self.main:
            with self.watched():
                said = json.loads(send(b""))
            if "failed" not in said:
                return str(said["told"])
            raise ProcessLostError(
                f"work in {self.count} processes",
                found=f"the first one failed: {said['failed']}",
                where=f"process {self.number}",
                do="see what that process said",
            )
        try:
            text = make()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the others may be gone
                send(json.dumps({"failed": str(error) or type(error).__name__}).encode())
            raise
        with self.watched():
            send(json.dumps({"told": text}).encode())
        return text

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Errors of the backend that mean that another process is gone, as ours.

        Raises:
            ProcessLostError: one of several processes ended, or does not answer.
        """
        try:
            yield
        except RuntimeError as cause:
            said = str(cause).strip() or type(cause).__name__
            if self.count == 1 or isinstance(cause, torch.OutOfMemoryError) or not LOST.search(said):
                raise
            raise ProcessLostError(
                f"train in {self.count} processes",
                found=f"another process is gone or does not answer ({said.splitlines()[0][:200]})",
                where=f"process {self.number}",
                do="see what that process said; the last checkpoint, if any were asked for, goes on with as many "
                "processes (niwaki resume)",
            ) from cause


def told_by_first(model: nn.Module, make: Callable[[], str]) -> str:
    """What `make` gives in the first of the processes that were launched together; the others wait and make nothing.

    Args:
        model: that they are to work on; it says on which device, where no launcher does.

    Raises:
        MissingExtraError: there are several, and accelerate is not installed.
        ProcessLostError: in the others, where the first one failed or is gone.
    """
    return make() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else Processes(model).told(make)


def shard(model: nn.Module, count: int) -> nn.Module:
    """`model` with its parameters in shards over all processes (FSDP2), modules of many parameters one by one.

    Source: torch.distributed.fsdp.fully_shard. What several modules share stays with the model around them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_of(model).type, (count,))
    least = int(os.environ.get("FSDP_MIN_NUM_PARAMS", SHARD))
    holders: dict[int, int] = {}
    for _, module in walk(model):
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    done: set[int] = set()
    for _, module in reversed(walk(model)[1:]):
        free = [p for p in module.parameters() if id(p) not in done]
        if sum(p.numel() for p in free) >= least and all(holders[id(p)] == 1 for p in free):
            done.update(map(id, free))
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            done.update(map(id, module.parameters()))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # what stayed gathered would miss changed weights
    return model


def _own(tensor: Tensor) -> Tensor:
    return like(tensor, tensor.detach().clone())


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
