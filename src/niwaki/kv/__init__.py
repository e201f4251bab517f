"""Key/value caches of transformers that hold fewer bytes, and attention that reads them as they are.

    cache = niwaki.kv.KVCache(model, how)                    # how: a `How`
    model.generate(**inputs, past_key_values=cache)
    with niwaki.kv.compressed(model, how) as session:        # or: every cache made inside
        model.generate(**inputs)
        session.nbytes()

Tested with transformers 5.23. How a method is written on this base:

*Layer*. A `How` gives one `KVLayer` per attention module (`Site`: heads, kv_heads, head_dim, the module itself). The
layer's one duty is `take(call) -> output`: store the call's new tokens and say what their queries see. `call` has the
rotated `query`, the new `keys` and `values`, the `mask` over every token seen, `scaling`, `softcap`, and
`call.own(keys, values)`, the model's own attention function. On an empty cache the output must be
`call.own(call.keys, call.values)`, so that prefill is bit-identical; the layer stores afterwards what it likes,
compact copies only (`Dense.of`). With `wants_inputs = True`, `call.inputs` holds the attention module, its normalised
hidden states and the cosines and sines of the new positions (for keys before rotation, or low-rank projections of the
hidden states).

*Parts*. `self.parts` holds what is stored, in the order of the tokens. A part (`Part`) gives `logits(query)`,
`mix(weights)`, `columns()` (where its tokens stand), `first(count)`, `batch(index)` and `tensors()`. `attend(call,
parts)` is attention over all of them: one softmax in float32, the call's scaling, soft-capping, and any mask, also
for several new tokens at once. `Segment` is the part for keys and values with some channels, in `Rows` of some kind
(`Dense` is one). Cropping, beams, batch selection and byte counts follow from the parts; state that is kept elsewhere
goes into `tensors`, `rebatch`, `forget` and `reset`.

*Dispatch*. `update` hands the new keys to the model with the layer attached to the tensor. While a forward with such
a cache runs, the model's configuration names `niwaki_sdpa` or `niwaki_eager`, functions in transformers'
attention-interface registry that find the layer on the keys and let it attend; keys without a layer (sliding layers,
other models) go to the model's own function. Hooks on the decoder turn this on and off; they leave with the last
cache or at the end of the block, also after exceptions. If attention is computed without asking the layer, the next
`update` says so: never silently wrong.

*Bytes*. `storage_bytes` counts distinct storages (`untyped_storage().nbytes()`), so a slice counts as all that it
keeps alive; `cache.nbytes()`, `layer.nbytes()` and `cache_bytes(any growing cache)` are sums of it.

*Models*. `sites(model)` supports by structure: a decoder of transformers whose layers all see all tokens or slide,
with attention modules that take rotary `position_embeddings`, call `past_key_values.update` and go through the
registry. Others are refused by name with the reason (`UnsupportedModelError`): ALiBi, learned positions, latent
attention, learned sinks, cross-attention, shared keys, linear or chunked layers, flash or flex implementations.
"""

from niwaki.kv.attention import Call, Inputs, attend
from niwaki.kv.cache import How, KVCache, Load, Session, cache_bytes, compressed
from niwaki.kv.channels import Channels
from niwaki.kv.compression import Compression
from niwaki.kv.cskv import CSKV, CSKVCache, cskv
from niwaki.kv.dense import Dense, Rows
from niwaki.kv.eviction import Eviction, Tokens
from niwaki.kv.h2o import H2O
from niwaki.kv.kivi import KIVI
from niwaki.kv.layer import KVLayer
from niwaki.kv.observation import Observation
from niwaki.kv.packed import Bits, Grid, Packed
from niwaki.kv.plan import CachePlan, plan
from niwaki.kv.projections import Projections, outlined, project
from niwaki.kv.reconstruction import Rounding, errors_of, reconstruct
from niwaki.kv.segments import Part, Segment
from niwaki.kv.sizes import storage_bytes
from niwaki.kv.snapkv import SnapKV
from niwaki.kv.streaming_llm import StreamingLLM
from niwaki.kv.support import Site, UnsupportedModelError, sites
from niwaki.kv.thin import ThinKCache, think
from niwaki.kv.think import ThinK
from niwaki.kv.trial import decoding

__all__ = [
    "CSKV",
    "H2O",
    "KIVI",
    "Bits",
    "CSKVCache",
    "CachePlan",
    "Call",
    "Channels",
    "Compression",
    "Dense",
    "Eviction",
    "Grid",
    "How",
    "Inputs",
    "KVCache",
    "KVLayer",
    "Load",
    "Observation",
    "Packed",
    "Part",
    "Projections",
    "Rounding",
    "Rows",
    "Segment",
    "Session",
    "Site",
    "SnapKV",
    "StreamingLLM",
    "ThinK",
    "ThinKCache",
    "Tokens",
    "UnsupportedModelError",
    "attend",
    "cache_bytes",
    "compressed",
    "cskv",
    "decoding",
    "errors_of",
    "outlined",
    "plan",
    "project",
    "reconstruct",
    "sites",
    "storage_bytes",
    "think",
]
