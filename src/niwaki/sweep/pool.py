"""Ray: where attempts run, on this machine or on a cluster."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, final

from niwaki.errors import InputError, MissingExtraError
from niwaki.sweep import guard
from niwaki.sweep.attempt import Attempt, attempt
from niwaki.sweep.trials import Trial

LOCAL = "local"


@final
@dataclass(frozen=True)
class Workers:
    """What runs the trials."""

    address: str = LOCAL
    """"local" starts Ray on this machine and ends it; "auto" or "ray://host:port" joins a cluster."""
    cpus: int = 1
    """Cores of each trial, and its threads: as many trials run at once as there are cores for."""
    gpus: float = 0
    """GPUs of each trial; 0.5 lets two share one."""
    tries: int = 3
    """How often a trial that fails is begun. One whose input was wrong is begun once; lost workers do not count."""

    def __post_init__(self) -> None:
        for name, least, kinds in (("cpus", 1, int), ("gpus", 0, (int, float)), ("tries", 1, int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:  # type: ignore[arg-type]
                raise InputError(f"{name}={value!r} of a sweep", found="not such a number", do=f"give {least} or more")
        if not isinstance(self.address, str) or not self.address:
            raise InputError(
                f"address={self.address!r} of a sweep", found="no text", do='give "local", "auto" or ray://'
            )


class Pool(Protocol):
    """Takes trials and gives them back when an attempt has ended."""

    def begin(self, trial: Trial) -> None:
        """Start an attempt, or put it into the queue."""

    def ended(self) -> tuple[Trial, Attempt]:
        """The next attempt that ends; waits for it."""


@final
class RayPool:
    """Attempts as Ray tasks; inside `with`, Ray is there."""

    def __init__(self, workers: Workers, common: Mapping[str, Any], places: Mapping[str, tuple[str, str]]) -> None:
        """`common`: arguments of every `attempt`; `places`: folder and log by a trial's digest."""
        self.workers, self.common, self.places = workers, dict(common), dict(places)
        self._running: dict[Any, Trial] = {}
        self._own = False
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "RayPool":
        ray = self._ray = _ray()
        if not ray.is_initialized():
            self._own = True
            if self.workers.address == LOCAL:  # before Ray: its start may be cut short, too; and out of Ctrl-C's reach
                words = [sys.executable, "-IS", str(guard.__file__), str(os.getpid())]
                nothing = subprocess.DEVNULL
                self._guard = subprocess.Popen(
                    words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
                )
            try:
                ray.init(
                    address=self.workers.address, logging_level=logging.ERROR, log_to_driver=False,
                    **({"include_dashboard": False} if self.workers.address == LOCAL else {}),
                )  # fmt: skip
            except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
                self._unguarded()
                raise InputError(
                    f"--address {self.workers.address}",
                    found=_line(error),
                    do="start Ray there (`ray start --head`), or leave --address out",
                ) from error
        largest = max((float(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0.0)
        if largest < self.workers.cpus:
            self.__exit__(None, None, None)
            found = f"the largest machine has {largest:g}"
            raise InputError(f"{self.workers.cpus} cpus for each trial", found=found, do="give fewer cpus")
        self._task = ray.remote(_on_ray)
        self._each = {
            "num_cpus": self.workers.cpus,
            "num_gpus": self.workers.gpus,
            "max_retries": 0,  # the sweep counts and reports attempts itself
            "scheduling_strategy": "SPREAD",
        }
        return self

    def begin(self, trial: Trial) -> None:
        folder, log = self.places[trial.digest]
        reference = self._task.options(name=trial.name, **self._each).remote(
            trial.arguments, folder, trial.digest, log=log, **self.common
        )
        self._running[reference] = trial

    def ended(self) -> tuple[Trial, Attempt]:
        ray = self._ray
        while True:
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0)  # short, so that Ctrl-C is heard
            if ready:
                break
        trial = self._running.pop(ready[0])
        try:
            return trial, Attempt(**ray.get(ready[0]))
        except (ray.exceptions.RayTaskError, TypeError) as error:
            return trial, Attempt(False, _line(error, last=True))
        except ray.exceptions.RayError as error:
            return trial, Attempt(False, f"its worker went away: {_line(error)}", lost=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._own:
            self._ray.shutdown()
        self._unguarded()

    def _unguarded(self) -> None:
        """Ray has ended by itself, or is another's."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            self._guard = None


def _on_ray(*words: Any, **more: Any) -> dict[str, Any]:
    """`attempt`, and which of Ray's nodes it was on: a machine may have several."""
    ended = attempt(*words, **more)
    import ray

    return {**ended, "node": f"{ended['node']}/{ray.get_runtime_context().get_node_id()[:8]}"}


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a sweep tells nobody of itself
    try:
        import ray
        import ray.exceptions
    except ImportError as cause:
        raise MissingExtraError(
            "run a sweep", found="Ray is not installed", do="pip install 'niwaki[sweep]' (or ray itself)"
        ) from cause
    return ray


def _line(error: BaseException, *, last: bool = False) -> str:
    """One line of what Ray says: a worker's traceback ends with the reason, its own errors begin with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if last else 0].split(". ")[0] if lines else type(error).__name__
