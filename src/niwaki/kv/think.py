"""Channels of the key cache that the last queries use least go."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from niwaki.errors import InputError, NotFiniteError
from niwaki.kv.channels import Channels, best, share, stay
from niwaki.kv.observation import Observation
from niwaki.kv.sources import turns_halves
from niwaki.kv.support import Site


@final
@dataclass(frozen=True)
class ThinK(Channels):
    """Per head, the channels with the largest part in the products of the last queries and all kept keys stay.

    score_j = ||Q[-window:, j]||_2 * ||K[:, j]||_2, the Frobenius norm of channel j's rank-one term of Q K^T, with the
    queries of a group stacked; in float32, padding left out.

    Source: Xu et al. 2025, arXiv:2407.21018 (ICLR 2025), sec. 3 and appendix D. Differs: one choice per key/value head
    (the paper's code has one per query head and repeats keys and values for it; `per_query_head` does that).

    Raises:
        InputError: a share outside (0, 1], a window or multiple below 1.
    """

    keep: float = 0.6
    """Share of key channels that stay, in (0, 1]; the paper's ratio is 1 - keep. Removed: floor of the count."""
    values: float = 1.0
    """Share of value channels that stay, by the norm of the attention output's channels (appendix D); experimental."""
    window: int = 32
    """Last queries of the prompt that are asked, in tokens; a shorter prompt is asked whole."""
    round_to: int = 1
    """Channels that stay are rounded up to a multiple of this; 8 suits kernels (77 of 128 become 80)."""
    pairwise: bool = False
    """Keep or drop the two channels that rotate together, j and j + head_dim / 2; other pairs are refused. Not in the
    paper; was worse in a small trial."""
    per_query_head: bool = False
    """One choice, and one copy of keys and values, per query head: the paper's code; takes `group` times the bytes."""

    def __post_init__(self) -> None:
        share("key", self.keep)
        share("value", self.values)
        for name in ("window", "round_to"):
            if getattr(self, name) < 1:
                raise InputError(f"ThinK({name}={getattr(self, name)})", found="less than 1", do="give 1 or more")

    def widths(self, site: Site) -> tuple[int, int]:
        unit = 2 if self.pairwise else 1
        if self.pairwise and (site.rotated != site.head_dim or site.head_dim % 2):
            found = f"{site.rotated} of {site.head_dim} channels rotate"
            raise InputError("ThinK(pairwise=True)", found=found, where=site.name, do="use pairwise=False")
        if self.pairwise and not turns_halves(site):
            found = "channels that do not rotate as pairs (j, j + head_dim / 2)"
            raise InputError("ThinK(pairwise=True)", found=found, where=site.name, do="use pairwise=False")
        keys = stay(self.keep, site.head_dim, round_to=self.round_to)
        return min(site.head_dim, -(-keys // unit) * unit), stay(self.values, site.head_dim, round_to=self.round_to)

    def choose(self, seen: Observation, site: Site) -> tuple[Tensor | None, Tensor | None]:
        keys, values = self.widths(site)
        return (
            self._best(self.key_scores(seen), keys, site) if keys < site.head_dim else None,
            self._best(value_scores(seen, self.window), values, site, paired=False) if values < site.head_dim else None,
        )

    def key_scores(self, seen: Observation) -> Tensor:
        """float32 `[batch, heads, head_dim]`."""
        return (seen.query_norms(self.window).sqrt_()) * (seen.key_norms().sqrt_())

    def _best(self, scores: Tensor, count: int, site: Site, *, paired: bool = True) -> Tensor:
        if not torch.isfinite(scores).all():
            row, head, channel = (int(i) for i in (~torch.isfinite(scores)).nonzero()[0])
            where = f"{site.name}, sequence {row}, head {head}, channel {channel}"
            do = "look for an overflow in the model; load it in bfloat16 or float32"
            raise NotFiniteError(
                "score channels", found=f"{scores[row, head, channel]} in keys or queries", where=where, do=do
            )
        if self.pairwise and paired:
            half = scores.shape[-1] // 2
            pairs = best(scores[..., :half] + scores[..., half:], count // 2)
            return torch.cat((pairs, pairs + half), dim=-1).to(torch.int16)
        return best(scores, count).to(torch.int16)


def value_scores(seen: Observation, window: int) -> Tensor:
    """||softmax(Q K^T) V[:, j]||_F over the last `window` queries and the group: float32 `[batch, heads, head_dim]`."""
    output, _ = seen.attention(window)  # [batch, query heads, window, head_dim]
    squares = output.float().square().sum(dim=2)
    return squares.view(squares.shape[0], seen.kept.keys.read().shape[1], -1, squares.shape[-1]).sum(dim=2).sqrt_()
