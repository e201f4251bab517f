"""After the cut, without training: statistics and constants set right."""

from niwaki.repair.batch_norm import BatchNormStatistics
from niwaki.repair.constants import FoldedConstants

__all__ = ["BatchNormStatistics", "FoldedConstants"]
