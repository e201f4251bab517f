"""The verbs in one call, and a saved run back in memory."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from niwaki.distill import Weighted
from niwaki.distill.taps import module_at, unwrapped
from niwaki.errors import FileDamagedError, InputError, PlanMismatchError
from niwaki.files import PLAN, SURGERY, WEIGHTS, refuse_unended
from niwaki.graph.skeleton import copy_with, identity, shared
from niwaki.graph.trace import fingerprint, passing_buffers
from niwaki.measure import Meter, Target
from niwaki.methods.job import Job, Method, Outcome
from niwaki.methods.trained import fill_trained_, is_training
from niwaki.plan import Plan
from niwaki.quantize import Quantised, unpacked_state
from niwaki.surgery.cut import redo
from niwaki.surgery.exported import rebuild
from niwaki.surgery.on_disk import fill_stored
from niwaki.surgery.record import Surgery, remember
from niwaki.tasks import Task
from niwaki.train import Recovery
from niwaki.units import Budget, budgets_of

log = logging.getLogger(__name__)

LITTLE = 0.01
"""Shares below are asked about: hardly any network works with a hundredth of itself, and 0.001 may be what is to go."""


def compress(
    model: nn.Module,
    example: Any,
    *,
    method: Method,
    budget: Budget | Sequence[Budget],
    task: Task | None = None,
    recovery: Recovery | None = None,
    distill: Sequence[Weighted] = (),
    repair: bool = True,
    calibration: int = 16,
    protect: Sequence[str] = (),
    seed: int = 0,
    limit: int | None = None,
    meters: tuple[Meter, ...] = (),
    progress: Callable[[str, float], None] | None = None,
    steps: Callable[[int, int, str], None] | None = None,
    target: Target | None = None,
    table: str | Path | None = None,
    partial: str | Path | None = None,
    source: str = "",
    weights: str = "",
    drawn: Sequence[str] = (),
    command: str | None = None,
) -> Outcome:
    """Trace, score, choose, cut, verify, repair, recover, measure. `model` itself is left alone.

    Of several processes (`accelerate launch`) the first one scores, measures and chooses, and has all measurements; the
    others wait for its plan, and have none.

    Args:
        task: what a batch means; without it nothing is repaired, recovered or scored by gradients.
        recovery: a short training after the cut.
        distill: losses by which the uncut model teaches the cut one in the recovery; see `niwaki.distill`.
        calibration: batches for the re-estimation of batch norm, by methods that do it (not UDFC, PreCropping).
        limit: test samples to evaluate on (all by default).
        progress: called after each stage with its name and seconds.
        target: where it will run; then the plan promises latency there, whatever the budget is of, and it is measured.
        table: the file that keeps what was measured on the target, so that layers are measured once.
        partial: a folder for the plan and the recovery's checkpoints; where there are some (the same call was killed),
            the recovery goes on from the newest, and the plan is not chosen again.
        source, weights, command: where the model and its weights came from, and what was typed; kept with the run.
        drawn: tensors that the weights did not bring (`models.load(...).drawn`): methods that train begin with these.
        steps: called after each training step with its number, the number of steps and the epoch in words.

    Raises:
        InputError and its kin: a budget that can't be met, a protected name that does not exist, weights with NaN, ...
        CannotCutError: neither door opens, or the judge refuses the cut.

    Examples:
        >>> import torch, niwaki
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> how = niwaki.methods.Magnitude()
        >>> result = niwaki.compress(net, torch.zeros(1, 4), method=how, budget=niwaki.Budget(keep=0.5))
        >>> int(result.after["macs"].value)
        24
    """
    if not isinstance(method, Method):
        raise InputError(
            f"method {method!r}",
            found=type(method).__name__,
            do="pass an instance from niwaki.methods, e.g. Magnitude()",
        )
    budgets = budgets_of(budget)
    if distill and recovery is None:
        do = "give a recovery (--recover on the command line)"
        raise InputError("distil without a recovery", found="nothing is trained", do=do)
    for path in (theirs for one in distill for _, theirs in one.pairs):
        module_at(unwrapped(model), path)
    for one in budgets:
        if isinstance(one.keep, float) and not one.absolute and one.keep < LITTLE:
            log.warning("keep %g is what stays: %g %% of the %s", one.keep, 100 * one.keep, one.of)
    return method(
        Job(
            model=model,
            example=example,
            budget=budgets,
            task=task,
            recovery=recovery,
            distill=tuple(distill),
            repair=repair,
            calibration=calibration,
            protect=tuple(protect),
            seed=seed,
            limit=limit,
            meters=meters,
            progress=progress,
            steps=steps,
            target=target,
            table=None if table is None else Path(table),
            partial=None if partial is None else Path(partial),
            source=source,
            weights=weights,
            drawn=tuple(drawn),
            command=command,
        )
    )


def load(folder: str | Path, factory: Callable[[], Any]) -> nn.Module:
    """The model of a saved run; `factory()` gives the architecture it was made from (weights do not matter).

    Of a run of `niwaki train` that is the model itself, of the others the uncut one.

    Nothing is traced and no pickle is read. Tensors that were shared are shared again, whether `factory` shares them or
    not. Of a folder that `cut_stored` wrote, the weights are read when they are first used, and `factory` may leave
    parameters on the meta device (`niwaki.models.outline`).

    Raises:
        InputError: a run that did not end, or no factory.
        FileDamagedError: a file is missing, truncated or tampered with.
        PlanMismatchError: `factory` makes another model, or one that shares tensors which were saved apart.
    """
    folder = Path(folder)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise InputError(
            f"load a run with {type(factory).__name__}",
            found="not a factory",
            do="pass a function that makes the uncut model, e.g. lambda: Net()",
        )
    refuse_unended(folder, f"load {folder}")
    made = factory()
    model = made[0] if isinstance(made, tuple) else made
    if is_training(folder):
        return fill_trained_(model, folder)
    plan = Plan.from_json(_text(folder / PLAN), file=str(folder / PLAN))
    plan.bound(model, fingerprint(model))
    try:
        data = json.loads(_text(folder / SURGERY))
        surgery = Surgery(
            data["door"], tuple(data["mends"]), tuple(data["scaled"]), data["graph"], tuple(data.get("biases", ()))
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FileDamagedError(
            "load a run",
            found=f"{type(error).__name__}: {error}",
            where=str(folder / SURGERY),
            do="save it again",
        ) from error
    if data.get("stored"):
        return fill_stored(redo(model, plan, surgery), folder)
    tensors = read_tensors(folder / WEIGHTS)
    if surgery.door not in ("eager", "exported"):
        raise FileDamagedError("load a run", found=f"door {surgery.door!r}", where=str(folder), do="save it again")
    if surgery.door == "exported":
        trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        if surgery.graph is None or not set(trainable) <= set(tensors):
            raise FileDamagedError(
                "load a run", found="tensors or graph missing", where=str(folder), do="save it again"
            )
        try:
            small: nn.Module = rebuild(dict(surgery.graph), tensors, trainable)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, FileDamagedError):
                raise
            raise _damaged(folder, error) from error
        small.train(model.training) if model.training and surgery.graph["programs"].get("train") else small.eval()
        remember(small, surgery)
        return small
    try:
        small = redo(_tied(model, tensors), plan, surgery)
    except (KeyError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, PlanMismatchError):
            raise
        raise FileDamagedError(
            "load a run", found=f"{type(error).__name__}: {error}", where=str(folder), do="save it again"
        ) from error
    own = _listed(small)
    if set(own) != set(tensors):
        odd = sorted(set(own) ^ set(tensors))[:4]
        raise FileDamagedError(
            "load a run",
            found=f"tensors do not match: {', '.join(odd)}",
            where=str(folder / WEIGHTS),
            do="save it again",
        )
    passing = passing_buffers(small)
    with torch.no_grad():
        for name, tensor in own.items():
            if (
                name in passing and not tensor.is_meta and tensor.dtype == tensors[name].dtype
            ):  # may be as long as the last input asked
                path, _, leaf = name.rpartition(".")
                setattr(small.get_submodule(path), leaf, tensors[name].to(tensor.device))
                continue
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise PlanMismatchError(
                    f"load {name}",
                    found=f"{tuple(tensors[name].shape)} {tensors[name].dtype}",
                    where=f"the factory's is {tuple(tensor.shape)} {tensor.dtype}",
                    do="use the factory of the saved model",
                )
            if tensor.is_meta:
                raise InputError(
                    "load into a model on the meta device", found=name, do="make the model on a real device"
                )
            tensor.copy_(tensors[name])
    return small


def _tied(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """`model` with the tensors shared that were shared when saved; another module on the same memory where it shares
    fewer.

    Raises:
        PlanMismatchError: it shares more.
    """
    own = _listed(model)
    saved, made = _firsts(tensors), _firsts(own)
    for name, first in made.items():
        if name not in saved or first not in saved or saved[name] == saved[first]:
            continue
        # a move to another device takes shared buffers apart, which says nothing as long as they are equal
        if isinstance(own[name], nn.Parameter) or not torch.equal(tensors[name], tensors[first]):
            raise PlanMismatchError(
                f"load {name}",
                found=f"the factory's model shares it with {first}, the saved one does not",
                do="use a factory that leaves them apart, as the saved model did",
            )
    apart = {name: first for name, first in saved.items() if name in made and made[name] != made.get(first)}
    if not apart:
        return model
    twin = copy_with(model, shared)
    for name, first in apart.items():
        tensor = _listed(twin)[first]
        if tensor.shape != own[name].shape or isinstance(tensor, nn.Parameter) != isinstance(own[name], nn.Parameter):
            raise ValueError(f"{name} cannot be the same tensor as {first}")
        path, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(path), leaf, tensor)
    return twin


def _listed(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every one of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _firsts(tensors: dict[str, Tensor]) -> dict[str, str]:
    """For each name the first name of the same tensor."""
    first: dict[Any, str] = {}
    return {name: first.setdefault(identity(tensor), name) for name, tensor in tensors.items()}


def _damaged(folder: Path, error: Exception) -> FileDamagedError:
    return FileDamagedError(
        "load a run", found=f"{type(error).__name__}: {error}", where=str(folder / SURGERY), do="save it again"
    )


def read_codes(path: Path) -> dict[str, Quantised]:
    """The codes of the weights that a run saved on a grid; none where it saved none.

    Raises:
        FileDamagedError: the file is no run's.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            if "packed" not in metadata:
                return {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return unpacked_state(tensors, json.loads(metadata["packed"]))[1]
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise FileDamagedError(
            "read saved codes", found=str(error), where=str(path), do="save the run again"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, shared ones under each of their names as one tensor."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            aliases = json.loads(metadata.get("aliases", "{}"))
        if "packed" in metadata:
            tensors, _ = unpacked_state(tensors, json.loads(metadata["packed"]))
        return {**tensors, **{name: tensors[first] for name, first in aliases.items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise FileDamagedError(
            "read tensors", found=f"{type(error).__name__}: {error}", where=str(path), do="save the run again"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileDamagedError(
            "load a run", found=f"{type(error).__name__}", where=str(path), do="give a folder that outcome.save() wrote"
        ) from error
