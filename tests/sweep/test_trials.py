"""Trials: every combination once, known again by what decides their result."""

from pathlib import Path

import pytest

from niwaki.errors import InputError
from niwaki.sweep.trials import grid

MODEL = {"model": "torchvision:resnet18"}


def test_every_combination_once_the_last_option_fastest() -> None:
    trials = grid({**MODEL, "method": ["taylor", "random"], "keep": [0.7, 0.5], "seed": [0, 1]})
    said = [(t.options["method"], t.options["keep"], t.options["seed"]) for t in trials]
    assert said == [
        ("taylor", 0.7, 0), ("taylor", 0.7, 1), ("taylor", 0.5, 0), ("taylor", 0.5, 1),
        ("random", 0.7, 0), ("random", 0.7, 1), ("random", 0.5, 0), ("random", 0.5, 1),
    ]  # fmt: skip
    assert len({t.name for t in trials}) == len({t.digest for t in trials}) == 8
    assert trials[0].name == f"taylor-0.7-seed0-{trials[0].digest[:8]}"


def test_settings_of_a_method_count_for_its_trials_only() -> None:
    trials = grid(
        {**MODEL, "method": ["magnitude", "random"]}, settings={"magnitude": {"p": [1, 2], "rule": "uniform"}}
    )
    assert [t.options.get("settings") for t in trials] == [
        {"p": 1, "rule": "uniform"},
        {"p": 2, "rule": "uniform"},
        None,
    ]
    assert trials[1].arguments == (
        "compress", "torchvision:resnet18", "--method=magnitude", "--set=p=2", "--set=rule=uniform",
    )  # fmt: skip


def test_arguments_are_the_command_lines() -> None:
    (trial,) = grid(
        {**MODEL, "exact_only": True, "limit_test": 10, "protect": ["fc", "conv1"]}, settings={"magnitude": {"a": "1"}}
    )
    assert trial.arguments[2:] == (
        "--exact-only", "--limit-test=10", "--protect=fc", "--protect=conv1", '--set=a="1"',
    )  # fmt: skip
    (off,) = grid({**MODEL, "exact_only": False})
    assert off.arguments == ("compress", "torchvision:resnet18")


def test_a_list_of_lists_is_several_values_of_what_is_given_several_times() -> None:
    trials = grid({**MODEL, "budget": [["keep=0.5,of=macs"], ["keep=0.4,of=macs", "keep=0.6,of=params"]]})
    assert [len(t.arguments) - 2 for t in trials] == [1, 2]
    assert [t.arguments[2:] for t in grid({**MODEL, "distill": [[], ["logits"]]})] == [(), ("--distill=logits",)]


def test_what_a_file_holds_is_part_of_the_digest(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    first = grid({**MODEL, "checkpoint": str(weights)})[0]
    assert grid({**MODEL, "checkpoint": str(weights)})[0].digest == first.digest
    weights.write_bytes(b"three")
    assert grid({**MODEL, "checkpoint": str(weights)})[0].digest != first.digest


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({}, {}, "no model"),
        ({**MODEL, "keep": []}, {}, "keep of a sweep; found: an empty list"),
        ({**MODEL, "keep": [0.5, 0.5]}, {}, "the same trial twice"),
        ({**MODEL, "checkpoint": "nowhere.pt"}, {}, "no such file"),
        ({**MODEL, "method": "taylor"}, {"random": {"rule": "uniform"}}, "settings of random; found: methods: taylor"),
    ],
)
def test_refusals(options: dict, settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        grid(options, settings=settings)
