"""Trained CIFAR-10 networks at half of their MACs: accuracy after the cut, after repair, after a short training, beside a peer."""

import argparse
import copy
import importlib.util
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from rows import ROOT, Rows, arguments, table
from torch import nn

import niwaki
from niwaki.models.checkpoint import read_checkpoint
from niwaki.tasks import Classification
from niwaki.train import Recovery

NETWORKS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
RANDOM_SEEDS = (0, 1, 2)
METHODS: dict[str, niwaki.methods.Method] = {
    "magnitude-uniform": niwaki.methods.Magnitude(p=2, rule="uniform"),
    "magnitude-global": niwaki.methods.Magnitude(p=2, rule="global_rank"),
    "norm-scale": niwaki.methods.NormScale(),
    "taylor": niwaki.methods.Taylor(),
    "random": niwaki.methods.Random(),
}
