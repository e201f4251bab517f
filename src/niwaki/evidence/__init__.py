"""What may be looked at before deciding: weights always, gradients and curvature when a score asks for them."""

from niwaki.evidence.curvature import Curvature
from niwaki.evidence.evidence import Checked, Evidence, GroupView, Need, collect, need_numbers, views

__all__ = ["Checked", "Curvature", "Evidence", "GroupView", "Need", "collect", "need_numbers", "views"]
