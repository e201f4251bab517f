"""What may be looked at before deciding: weights always, gradients when a score asks for them."""

from niwaki.evidence.evidence import Checked, Evidence, GroupView, Need, collect, need_numbers, views

__all__ = ["Checked", "Evidence", "GroupView", "Need", "collect", "need_numbers", "views"]
