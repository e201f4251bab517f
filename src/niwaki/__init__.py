"""niwaki makes trained PyTorch networks smaller and really faster, and proves it.

The verbs and the data types; nothing else is public. `bench`, `export`, `measure`, `repair`, `report` and
`sweep` are both: the folder of their blocks, and a call. Importing this module imports no torch: names load on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "trace": "niwaki.graph",
    "ChannelGraph": "niwaki.graph",
    "collect": "niwaki.evidence",
    "Evidence": "niwaki.evidence",
    "score": "niwaki.scores",
    "Scores": "niwaki.scores",
    "choose": "niwaki.budgets",
    "Plan": "niwaki.plan",
    "Budget": "niwaki.units",
    "Group": "niwaki.units",
    "Member": "niwaki.units",
    "Receipt": "niwaki.units",
    "Unknown": "niwaki.units",
    "Stored": "niwaki.stored",
    "cut": "niwaki.surgery",
    "cut_": "niwaki.surgery",
    "cut_optimizer_": "niwaki.surgery",
    "cut_stored": "niwaki.surgery",
    "fill_stored": "niwaki.surgery",
    "mask": "niwaki.surgery",
    "verify": "niwaki.surgery",
    "Measurement": "niwaki.measure",
    "Job": "niwaki.methods",
    "Outcome": "niwaki.methods",
    "compress": "niwaki.methods",
    "compress_stored": "niwaki.methods",
    "load": "niwaki.methods",
}
_FOLDERS = (
    "bench",
    "budgets",
    "data",
    "distill",
    "errors",
    "evidence",
    "export",
    "graph",
    "kv",
    "measure",
    "methods",
    "models",
    "pressure",
    "quantize",
    "repair",
    "report",
    "scores",
    "search",
    "sensitivity",
    "surgery",
    "sweep",
    "tasks",
    "train",
    "units",
)

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"niwaki.{name}")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'niwaki' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_FOLDERS])


if TYPE_CHECKING:
    from niwaki.budgets import choose
    from niwaki.evidence import Evidence, collect
    from niwaki.graph import ChannelGraph, trace
    from niwaki.measure import Measurement
    from niwaki.methods import Job, Outcome, compress, compress_stored, load
    from niwaki.plan import Plan
    from niwaki.scores import Scores, score
    from niwaki.stored import Stored
    from niwaki.surgery import cut, cut_, cut_optimizer_, cut_stored, fill_stored, mask, verify
    from niwaki.units import Budget, Group, Member, Receipt, Unknown
