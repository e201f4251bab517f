"""Lets a model's attention ask compressed caches: two hooks on its decoder, and a switch that is on during a forward.

While a forward with such a cache runs, the configuration names the registered function instead of the model's own;
before and after it says what it always said. Nothing else of the model is touched, and no modelling code is copied.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from niwaki.errors import InputError
from niwaki.kv.attention import PREFIX, Inputs, dispatch
from niwaki.kv.layer import KVLayer
from niwaki.kv.support import IMPLEMENTATIONS, implementation, sites

Incoming = Callable[[Any], Any]
"""What becomes of the cache that a forward is given; called before the forward."""

_lock = threading.RLock()
_attached: "weakref.WeakKeyDictionary[nn.Module, Attachment]" = weakref.WeakKeyDictionary()
_registered = 0


class Attachment:
    """The hooks on one model, shared by all its caches and removed with the last of them."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = sites(model)
        implementation(model, self.sites)
        self.users = 0
        self.incoming: Incoming | None = None
        self._configs = {id(site.module.config): site.module.config for site in self.sites}
        self._names: dict[int, str | None] = {}
        self._depth = 0
        self._calls = threading.local()
        decoder = model.get_decoder()  # type: ignore[operator]
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            *(site.module.register_forward_pre_hook(_collect, with_kwargs=True) for site in self.sites),
        ]
        _register(+1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """A copied model is not attached; it carries hooks that know no cache of it."""
        return self

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        with _lock:
            self._restore()
        _register(-1)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stack = self._calls.__dict__.setdefault("stack", [])
        stack.append(False)
        given = next((one for one in args if _is_cache(one)), kwargs.get("past_key_values"))
        cache = self.incoming(given) if self.incoming is not None and _caches(module, kwargs) else given
        if not any(isinstance(layer, KVLayer) for layer in getattr(cache, "layers", ())):
            return None
        if (owner := getattr(cache, "attachment", self)) is not self:
            do = "make a cache for this model"
            found = "one that was made for another model" if owner else "one that was closed"
            raise InputError("use a compressed cache", found=found, do=do)
        with _lock:
            if self._depth == 0:
                for key, config in self._configs.items():
                    name = config._attn_implementation or "eager"
                    if name not in IMPLEMENTATIONS:
                        found = f"the model's attention was set to {name!r} since"
                        raise InputError("use a compressed cache", found=found, do='set it to "sdpa" or "eager"')
                    self._names[key] = config._attn_implementation
                    config._attn_implementation_internal = PREFIX + name
            self._depth += 1
        stack[-1] = True
        if given is None:
            return args, {**kwargs, "past_key_values": cache}
        return None

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stack = self._calls.__dict__.get("stack")
        if stack and stack.pop():
            with _lock:
                self._depth -= 1
                if self._depth == 0:
                    self._restore()

    def _restore(self) -> None:
        for key, name in self._names.items():
            self._configs[key]._attn_implementation_internal = name
        self._names.clear()
        self._depth = 0


def attach(model: nn.Module) -> Attachment:
    """The model's attachment, made if there is none; `detach` when done.

    Raises:
        UnsupportedModelError: a model that is not handled, with the reason.
    """
    with _lock:
        found = _attached.get(model)
        if found is None:
            found = _attached[model] = Attachment(model)
        found.users += 1
        return found


def detach(model: nn.Module) -> None:
    """One user less; the last one takes the hooks with it."""
    with _lock:
        found = _attached[model]
        found.users -= 1
        if not found.users:
            del _attached[model]
            found.close()


def _collect(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives a layer that wants it what its attention module was called with."""
    cache = kwargs.get("past_key_values")
    layers = getattr(cache, "layers", ())
    number: int = module.layer_idx  # type: ignore[assignment]
    layer = layers[number] if number < len(layers) else None
    if isinstance(layer, KVLayer) and layer.wants_inputs:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        rotary = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        if hidden is None or rotary is None:
            do = "use a model whose decoder layers pass both"
            raise InputError("collect attention inputs", found="no hidden states or no rotary embeddings", do=do)
        layer.inputs = Inputs(module, hidden, rotary, kwargs.get("position_ids"))


def _caches(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this forward uses a cache."""
    asked = kwargs.get("use_cache")
    return bool(getattr(module.config, "use_cache", True) if asked is None else asked)


def _is_cache(thing: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(thing, Cache)


def _register(change: int) -> None:
    """Puts our names into transformers' registries while anything is attached, and takes them out afterwards."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    global _registered
    with _lock:
        _registered += change
        for name in IMPLEMENTATIONS:
            if _registered and change > 0:
                own = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
                type(ALL_ATTENTION_FUNCTIONS).register(PREFIX + name, dispatch(name, own))
                mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
                type(ALL_MASK_ATTENTION_FUNCTIONS).register(PREFIX + name, mask)
            elif not _registered:
                type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(PREFIX + name, None)
                type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(PREFIX + name, None)
