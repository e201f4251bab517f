"""The search by hand: the worked trace of the method's description, gates, shares, selection, and bad judges."""

import json
import math

import pytest

from niwaki.errors import InputError, NotFiniteError
from niwaki.search import Candidate, Choice, Geometric, Greedy, best_share
from niwaki.search.greedy import Found, Step

GROUPS = (Choice("A", 100), Choice("B", 100), Choice("C", 100))
SAID = {
    ("A", 5): (1.02, 2.02),
    ("A", 10): (1.05, 2.06),
    ("A", 15): (1.12, 2.10),
    ("B", 5): (1.07, 2.10),
    ("B", 10): (1.09, 2.20),
    ("C", 5): (1.20, 2.11),
}
ALLOWED = Geometric(initial_rate=0.1, initial_thres=1.2)(3)


class Table:
    """A judge that reads its losses from a table, and counts."""

    def __init__(self, said=SAID, base=(1.00, 2.00), scale=1.0):
        self.said, self.base, self.scale = said, base, scale
        self.asked = []

    def __call__(self, candidate):
        self.asked.append((candidate.group, candidate.count))
        one, two = self.base if candidate.group is None else self.said[candidate.group, candidate.count]
        return {"one": one, "two": two * self.scale}


def test_the_worked_trace():
    judge = Table()
    found = Greedy()(GROUPS, judge, ALLOWED)
    assert found.gone == {"A": 10, "B": 5}
    assert judge.asked == [(None, 0)] * 2 + [("A", 5), ("A", 10), ("A", 15), ("B", 5), ("B", 10), ("C", 5)]
    a, b, c = found.steps
    assert (a.allowance, b.allowance, c.allowance) == pytest.approx((0.1, 0.0568064, 0.0322696), abs=1e-6)
    assert b.reference == {"one": 1.05, "two": 2.06} and c.reference == {"one": 1.07, "two": 2.10}
    assert (b.trials[1].task, b.trials[1].rise) == ("two", pytest.approx(2.20 / 2.06 - 1))
    assert c.taken is None and c.after == c.reference and c.trials[0].rise == pytest.approx(1.20 / 1.07 - 1)
    # the bound telescopes: what every task ends with is within the product of what was allowed, and that within 1.2
    for task, before in found.base.items():
        end = c.after[task] / before
        factors = [step.after[task] / step.reference[task] for step in found.steps]
        assert end == pytest.approx(math.prod(factors), rel=1e-12)
        assert all(factor <= 1 + step.allowance for factor, step in zip(factors, found.steps, strict=True))
        assert end <= math.prod(1 + value for value in ALLOWED) == pytest.approx(1.2)


def test_a_group_left_whole_leaves_its_allowance_to_the_next():
    said = {("A", 5): (1.2, 2.0), ("B", 5): (1.09, 2.0), ("B", 10): (1.2, 2.0), ("C", 5): (1.2, 2.0)}
    found = Greedy()(GROUPS, Table(said), ALLOWED)
    assert found.gone == {"B": 5}
    assert [step.allowance for step in found.steps] == [ALLOWED[0], ALLOWED[0], ALLOWED[1]]


def test_the_reference_never_falls():
    said = {("A", 5): (0.9, 2.05), ("A", 10): (1.2, 2.0), ("B", 5): (1.05, 2.1), ("B", 10): (1.06, 2.2)}
    found = Greedy()(GROUPS[:2], Table(said), [0.1, 0.06])
    assert found.steps[1].reference == {"one": 1.0, "two": 2.05}  # not 0.9
    assert found.gone == {"A": 5, "B": 5}


def test_weights_of_tasks_change_no_decision():
    plain, scaled = (Greedy()(GROUPS, Table(scale=scale), ALLOWED) for scale in (1.0, 100.0))
    assert plain.gone == scaled.gone


@pytest.mark.parametrize(("allowance", "goes"), [(0.16, True), (0.14, False)])
def test_the_most_sensitive_task_decides(allowance, goes):
    def judge(candidate):
        base, cut = (2.0, 4.0, 1.0), (2.2, 4.2, 1.15)
        return dict(zip("abc", base if candidate.group is None else cut, strict=True))

    found = Greedy()([Choice("one", 2)], judge, [allowance])
    assert bool(found.gone) is goes
    trial = found.steps[0].trials[0]
    assert (trial.task, trial.rise) == ("c", pytest.approx(0.15))


def test_the_chosen_task_alone_decides():
    # the first cut hurts "one" most; later "two" rises by 40 percent, which nobody asks
    said = {("A", 5): (1.05, 2.02), ("A", 10): (1.06, 2.8), ("A", 15): (1.2, 2.1)}
    found = Greedy(gate="selected")(GROUPS[:1], Table(said), [0.1])
    assert found.gone == {"A": 10} and found.steps[0].decides == "one"
    assert Greedy()(GROUPS[:1], Table(said), [0.1]).gone == {"A": 5}
    assert Greedy()(GROUPS[:1], Table(said), [0.1]).steps[0].decides is None


def test_a_group_that_bears_everything_is_cut_and_stays_cut_for_the_next():
    judge = Table({**{("A", 5 * k): (1.0, 2.0) for k in range(1, 20)}, ("B", 5): (1.2, 2.0)})
    seen = []
    found = Greedy()(GROUPS[:2], lambda c: (seen.append(c.all), judge(c))[1], [0.1, 0.1])
    assert found.gone == {"A": 95} and seen[-1] == {"A": 95, "B": 5}


def test_shares_are_counted_in_integers():
    counts = Greedy().counts
    assert dict(counts(Choice("", 20)))[8] == 8  # 20 * 0.4: the float's floor may be 7
    assert [n for _, n in counts(Choice("", 16))] == list(range(1, 16)) and counts(Choice("", 16))[0] == (2, 1)
    assert counts(Choice("", 48))[0] == (1, 2) and counts(Choice("", 16))[-1] == (19, 15)
    assert counts(Choice("", 16, least=10))[-1][1] == 6
    assert counts(Choice("", 1)) == []
    eights = [n for _, n in Greedy(multiple=8).counts(Choice("", 64))]
    assert eights == [8, 16, 24, 32, 40, 48, 56]  # each the most that leaves a multiple and takes no more than asked
    assert [n for _, n in Greedy(multiple=8).counts(Choice("", 6))] == [1, 2, 3, 4, 5]


def test_it_ends_at_the_smallest_share_that_is_enough():
    judge = Table()
    found = Greedy()(GROUPS, judge, ALLOWED, enough=lambda gone: sum(gone.values()) >= 10)
    assert found.reached and found.gone == {"A": 10} and len(found.steps) == 1
    assert ("A", 15) not in judge.asked
    assert Greedy()(GROUPS, Table(), ALLOWED, enough=lambda gone: True).steps == ()
    assert not Greedy()(GROUPS, Table(), ALLOWED, enough=lambda gone: sum(gone.values()) >= 50).reached


def test_halving_ends_where_the_grid_does_with_fewer_questions():
    for limit in range(20):
        asked = {"grid": 0, "bisect": 0}
        gone = {}
        for scan in asked:

            def judge(candidate, scan=scan, limit=limit, asked=asked):
                asked[scan] += 1
                return {"loss": 1.0 if candidate.count <= limit else 2.0}

            gone[scan] = Greedy(scan=scan)([Choice("", 20)], judge, [0.1]).gone
        assert gone["grid"] == gone["bisect"] == ({"": limit} if limit else {})
        assert asked["bisect"] <= 2 + 1 + 5 and asked["grid"] == 2 + min(limit + 1, 19)


def test_it_goes_on_where_it_was():
    told = []
    whole = Greedy()(GROUPS, Table(), ALLOWED, tell=told.append)
    assert [len(found.steps) for found in told] == [0, 1, 2, 3]
    for killed in told:
        read = json.loads(json.dumps([step.to_json() for step in killed.steps]))
        done = Found(killed.base, tuple(Step.from_json(step) for step in read), killed.reached)
        assert done == killed
        judge = Table()
        assert Greedy()(GROUPS, judge, ALLOWED, done=done) == whole
        assert not any(group is None for group, _ in judge.asked)


def test_which_groups_are_kept():
    found = Greedy()(GROUPS, Table(), ALLOWED)
    saved = {"A": 6.0, "B": 1.5}
    # rises 0.11 for 6 and 0.06 for 1.5
    assert best_share(found, saved, 0.4, 3, relative=False) == {"A": 10}
    assert best_share(found, saved, 1.0, 3, relative=False) == {"A": 10, "B": 5}
    assert best_share(found, saved, 0.3, 3) == {}
    # B alone is best where it saves more: 0.02 + 0.04 / 2 for 9 against 0.05 + 0.06 / 2 for 6
    assert best_share(found, {"A": 6.0, "B": 9.0}, 0.4, 3) == {"B": 5}
    # loss two, weighted by 100, decides only where rises are not relative: 0.0183 < 0.0267 / 2 turns round
    heavy = Greedy()(GROUPS, Table(scale=100), ALLOWED)
    assert best_share(heavy, saved, 0.4, 3) == best_share(found, saved, 0.4, 3) == {"A": 10}
    with pytest.raises(InputError, match="topk=0"):
        best_share(found, saved, 0, 3)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_at_the_start(loss):
    with pytest.raises(NotFiniteError, match=r"loss of two.*before anything is cut"):
        Greedy()(GROUPS, Table(base=(1.0, loss)), ALLOWED)


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_without_shares_at_the_start(loss):
    with pytest.raises(InputError, match=r"loss of one.*before anything is cut: no rise is a share"):
        Greedy()(GROUPS, Table(base=(loss, 1.0)), ALLOWED)


def test_a_cut_network_without_numbers_is_too_much():
    found = Greedy()(GROUPS[:1], Table({("A", 5): (math.nan, 2.0)}), ALLOWED)
    assert not found.gone and found.steps[0].trials[0].rise == math.inf
    again = Step.from_json(json.loads(json.dumps(found.steps[0].to_json())))
    assert again.trials[0].rise == math.inf and math.isnan(again.trials[0].losses["one"])


def test_judges_that_say_two_things():
    numbers = iter([1.0, 1.01])
    with pytest.raises(InputError, match=r"loss of it.*0.01 apart"):
        Greedy()(GROUPS, lambda candidate: {"it": next(numbers)}, ALLOWED)
    with pytest.raises(InputError, match="names no task"):
        Greedy()(GROUPS, lambda candidate: {}, ALLOWED)
    with pytest.raises(InputError, match="same tasks"):
        Greedy()(GROUPS, lambda c: {"it": 1.0} if c.group is None else {"other": 1.0}, ALLOWED)
    with pytest.raises(InputError, match="known: all, selected"):
        Greedy(gate="some")
    with pytest.raises(InputError, match="multiple"):
        Greedy(multiple=0)
    assert Candidate({"a": 1}, "b", 0).all == {"a": 1}


@pytest.mark.parametrize("gate", ["all", "selected"])
def test_a_loss_at_its_bound_is_allowed(gate):
    """1.1 of 1.0 is 10 % more, though 1.1 / 1.0 - 1 is 0.10000000000000009."""
    said = {("A", 5): (1.1, 2.0), ("A", 10): (1.1 + 1e-9, 2.0)}
    assert Greedy(gate=gate)(GROUPS[:1], Table(said), [0.1]).gone == {"A": 5}
