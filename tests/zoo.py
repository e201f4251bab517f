"""The zoo: every tiny network that the laws run over, in one list."""

from networks import attention, branching, convolutional, detection, positions, residual, sequence, unseen, variations
from networks.registry import FACTS, ZOO, Case, randomize_

__all__ = ["FACTS", "ZOO", "Case", "named", "randomize_"]

_MODULES = (
    convolutional,
    branching,
    variations,
    attention,
    sequence,
    unseen,
    detection,
    residual,
    positions,
)  # importing them fills the list


def named(name: str) -> Case:
    """The one network of this name."""
    (case,) = [case for case in ZOO if case.name == name]
    return case
