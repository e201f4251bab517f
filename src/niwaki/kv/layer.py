"""What every compressed cache layer is to transformers: a cache layer that answers in parts."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from niwaki.errors import InputError
from niwaki.kv.attention import Call, Inputs, tagged
from niwaki.kv.segments import Part
from niwaki.kv.sizes import storage_bytes


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer, in parts that stand one behind the other.

    A subclass says in `take` what is stored of a call's tokens and how they attend. `seen` counts every token that
    came, evicted or not: it is what positions and masks are made of. Nothing may depend on `self.keys` or
    `self.values`, which stay None.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    wants_inputs: ClassVar[bool] = False
    """Whether `call.inputs` is needed: what the attention module was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: tuple[Part, ...] = ()
        self.seen = 0
        self.speaks = False
        """Whether this layer gives the warnings that hold for the whole cache; the first one does."""
        self.inputs: Inputs | None = None
        self._waiting = False

    @abstractmethod
    def take(self, call: Call) -> Tensor:
        """Store the new tokens and give their attention output, `[batch, new, query heads, head_dim]`.

        `self.seen` does not count them yet; `self.parts` must hold them afterwards. With an empty cache the output must
        be `call.own(call.keys, call.values)`: what the prompt sees is never compressed.
        """

    def attend(self, call: Call) -> Tensor:
        """Called by the registered attention function."""
        self._waiting = False
        inputs, self.inputs = self.inputs, None
        if inputs is not None:
            call = Call(**{**vars(call), "inputs": inputs})
        output = self.take(call)
        self.seen += call.new
        return output

    def tensors(self) -> Iterator[Tensor]:
        """Everything that this layer keeps between calls; further state is added by subclasses."""
        for part in self.parts:
            yield from part.tensors()

    def nbytes(self) -> int:
        """Bytes of the distinct storages that the layer keeps alive."""
        return storage_bytes(self.tensors())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """transformers hands the new keys and values over; they go on to attention with this layer attached.

        Raises:
            InputError: the last ones never arrived there.
        """
        if self._waiting:
            self._waiting = False
            found = "attention was computed without asking the cache layer"
            do = "give the cache to the model it was made for, with eager or sdpa attention, and make a new one"
            raise InputError("attend to a compressed cache", found=found, do=do)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._waiting = True
        return tagged(key_states, self), value_states

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.parts, self.seen, self._waiting = (), 0, False
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number; 0 forgets none.

        Raises:
            InputError: a positive number, or more tokens than the cache has.
        """
        count = -tokens_to_remove
        if count < 0 or count > self.seen:
            do = f"give a number from -{self.seen} to 0"
            raise InputError(f"crop a cache by {tokens_to_remove}", found=f"{self.seen} tokens", do=do)
        self.forget(count)
        self.seen -= count

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens from the parts. Layers that evict after the prompt override this and refuse."""
        parts = list(self.parts)
        while count and parts:
            last = parts.pop()
            if last.tokens > count:
                parts.append(last.first(last.tokens - count))
                break
            count -= last.tokens
        self.parts = tuple(parts)

    def rebatch(self, index: Tensor) -> None:
        """The sequences `index` of the batch, in that order."""
        self.parts = tuple(part.batch(index) for part in self.parts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.seen:
            self.rebatch(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            rows = next(self.tensors()).shape[0]
            self.rebatch(torch.arange(rows, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self.rebatch(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        raise InputError(
            "offload a compressed cache", found="its parts stay on the model's device", do="switch offloading off"
        )

    def prefetch(self) -> None:
        self.offload()
