"""Bytes of a compressed layer, worked out without running anything.

Per sequence and cached head, with S_p compressed and S_u whole tokens, T key and T' value channels of D that stay, b
bytes a number: keys b (S_p T + S_u D), values b (S_p T' + S_u D), 2 T and 2 T' for the channels' places where some are
left out, 4 per token where tokens are evicted, 4 more where their attention is summed. Packed rows take `Grid.nbytes`
in place of b S_p T.
"""

from niwaki.kv.cache import Load
from niwaki.kv.settings import Settings
from niwaki.kv.support import Site


def settings_bytes(settings: Settings, site: Site, load: Load) -> int:
    """Bytes that a `CompressedLayer` holds, to the byte."""
    width, heads = site.head_dim, site.kv_heads
    if settings.channels is not None and settings.channels.per_query_head:
        heads = site.heads
    policy = settings.tokens
    kept = load.prompt if policy is None else policy.budget(load.prompt)
    listed = policy is not None and (policy.ongoing or kept < load.prompt)
    whole = settings.whole(kept)
    old = kept - whole
    keys, values = (width, width) if settings.channels is None or not old else settings.channels.widths(site)
    whole += load.generated
    if load.generated and settings.flush and (old or settings.bits is not None or policy is not None):
        moved = max(0, whole - settings.recent) // settings.flush * settings.flush
        old, whole = old + moved, whole - moved
    if load.generated and policy is not None and policy.ongoing:
        old = min(old, max(0, policy.budget(load.prompt + load.generated) - whole))
    per_head = 2 * whole * width * load.element + sum(2 * kept for kept in (keys, values) if kept < width)
    if settings.bits is None:
        per_head += old * (keys + values) * load.element
    else:
        of_keys, of_values = settings.bits.grids()
        per_head += of_keys.nbytes(old, keys) + of_values.nbytes(old, values)
    if listed:
        per_head += 4 * (old + whole)
    if policy is not None and policy.ongoing and policy.asks == "all":
        per_head += 4 * (old + whole)
    return per_head * heads * load.batch
