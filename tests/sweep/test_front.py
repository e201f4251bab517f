"""The front, with points placed by hand."""

import itertools
import random

from niwaki.sweep.front import candidates, front, pareto


def test_front_by_hand() -> None:
    #   accuracy
    #   92 |              c        a (30, 80) cheapest        b (50, 90) beats d, e
    #   90 |       b      d        c (70, 92) most accurate   d (70, 90) same accuracy as b, dearer
    #   85 |       e               e (50, 85) same cost as b, worse
    #   80 |  a
    assert pareto([(30, 80), (50, 90), (70, 92), (70, 90), (50, 85)]) == (0, 1, 2)


def test_equal_points_do_not_beat_each_other() -> None:
    assert pareto([(50, 90), (50, 90), (60, 90)]) == (0, 1)
    assert pareto([]) == ()
    assert pareto([(1, 1)]) == (0,)


def test_front_is_what_the_definition_says() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randrange(6), float(draw.randrange(6))) for _ in range(8)]
        beaten = {
            one
            for one, other in itertools.permutations(range(8), 2)
            if points[other][0] <= points[one][0]
            and points[other][1] >= points[one][1]
            and points[other] != points[one]
        }
        assert set(pareto(points)) == set(range(8)) - beaten


def row(method: str, seed: int, accuracy: float | None, macs: float = 10.0, status: str = "done") -> dict:
    values = {"macs": macs} | ({} if accuracy is None else {"accuracy": accuracy})
    options = {"model": "m", "method": method, "seed": seed}
    return {"trial": f"{method}-{seed}", "status": status, "options": options, "values": values}


def test_seeds_become_one_candidate_and_the_front_stands_on_means() -> None:
    lucky = [row("random", 0, 95.0), row("random", 1, 75.0)]
    steady = [row("taylor", 0, 90.0), row("taylor", 1, 92.0), row("taylor", 2, 0.0, status="failed")]
    found = candidates([*lucky, *steady, row("bare", 0, None, macs=1.0)])
    assert [(one.settings["method"], one.values.get("accuracy"), one.trials) for one in found] == [
        ("random", 85.0, ("random-0", "random-1")),
        ("taylor", 91.0, ("taylor-0", "taylor-1")),
        ("bare", None, ("bare-0",)),
    ]
    assert found[0].spans["accuracy"] == (75.0, 95.0)
    assert [one.settings["method"] for one in front(found, "macs")] == [
        "taylor"
    ]  # not the lucky seed, not the unmeasured
