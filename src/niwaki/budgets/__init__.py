"""Budgets: scores in, a plan out. A rule orders what may go; the engine removes as little as the budgets allow."""

from niwaki.budgets.choose import TIMES, choose
from niwaki.budgets.global_rank import GlobalRank
from niwaki.budgets.rule import Rule
from niwaki.budgets.timed import table_path, timed
from niwaki.budgets.uniform import Uniform

__all__ = ["TIMES", "GlobalRank", "Rule", "Uniform", "choose", "table_path", "timed"]
