"""Budgets: scores in, a plan out. A rule orders what may go; the engine removes as little as the budgets allow."""

from niwaki.budgets.choose import TIMES, choose
from niwaki.budgets.density import Density, Layers
from niwaki.budgets.density_widths import DensityWidths
from niwaki.budgets.equal_density import EqualDensity
from niwaki.budgets.erk import ERK
from niwaki.budgets.global_rank import GlobalRank
from niwaki.budgets.group_threshold import GroupThreshold, at_pace, realised
from niwaki.budgets.layer_groups import Layer, LayerGroup, groups_by_scale, groups_given, scaled_layers
from niwaki.budgets.loss_rises import loss_rises
from niwaki.budgets.measured import Choose, Measured, choose_measured
from niwaki.budgets.pools import Pools, pools_of
from niwaki.budgets.rule import Rule
from niwaki.budgets.tables import Table
from niwaki.budgets.target_widths import TargetWidths
from niwaki.budgets.timed import table_path, timed
from niwaki.budgets.uniform import Uniform
from niwaki.budgets.water_filling import WaterFilling
from niwaki.budgets.width_program import WidthProgram

__all__ = [
    "ERK",
    "TIMES",
    "Choose",
    "Density",
    "DensityWidths",
    "EqualDensity",
    "GlobalRank",
    "GroupThreshold",
    "Layer",
    "LayerGroup",
    "Layers",
    "Measured",
    "Pools",
    "Rule",
    "Table",
    "TargetWidths",
    "Uniform",
    "WaterFilling",
    "WidthProgram",
    "at_pace",
    "choose",
    "choose_measured",
    "groups_by_scale",
    "groups_given",
    "loss_rises",
    "pools_of",
    "realised",
    "scaled_layers",
    "table_path",
    "timed",
]
