"""Search: groups cut one after the other, as far as a judge of the network's losses allows."""

from niwaki.search.geometric import Geometric
from niwaki.search.greedy import Candidate, Choice, Found, Greedy, Judge, Partial, Step, Trial, best_share
from niwaki.search.masked import Masked

__all__ = [
    "Candidate",
    "Choice",
    "Found",
    "Geometric",
    "Greedy",
    "Judge",
    "Masked",
    "Partial",
    "Step",
    "Trial",
    "best_share",
]
