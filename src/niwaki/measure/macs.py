"""How many multiply-adds one forward pass takes, counted by PyTorch's own counter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from niwaki.measure.measurement import Measurement, Meter, device_name, evaluating
from niwaki.units import device_of, run

# Calls on two or more float tensors that multiply and add nothing over a contracted axis, and so have no MACs to miss.
# Anything else without a formula is reported as uncounted; a name missing here makes a report longer, never wrong.
# fmt: off
WITHOUT_MACS = frozenset({
    "_batch_norm_with_update", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm", "native_group_norm", "native_layer_norm",
    "_fused_rms_norm", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell", "_cat", "cat", "stack", "copy", "copy_",
    "embedding", "gather", "index", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill",
    "index_put", "index_put_", "index_select", "_index_put_impl_", "_unsafe_index", "masked_fill", "masked_fill_",
    "masked_scatter", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "select_scatter",
    "slice_scatter", "where", "set_", "_foreach_add", "grid_sampler_2d", "grid_sampler_3d", "bucketize",
    "searchsorted", "equal", "allclose", "isin", "linspace",
})
# fmt: on


class _Unformulated(TorchDispatchMode):
    """Records calls that may multiply and add but have no formula in PyTorch's counter."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in flop_registry and self.may_contract(func, args, kwargs or {}):
            self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def may_contract(func: Any, args: Any, kwargs: Any) -> bool:
        if func.namespace != "aten":
            return func.namespace not in ("prim", "prims")
        name = func.overloadpacket.__name__
        if name.startswith(("_fft_", "linalg_", "_linalg_")):
            return True
        if name in WITHOUT_MACS or torch.Tag.pointwise in func.tags or func.is_view:
            return False
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return sum(operand.is_floating_point() or operand.is_complex() for operand in operands) > 1


@contextmanager
def _unfused(*, recurrent: bool) -> Iterator[None]:
    """Attention, and on request recurrent cells, as plain products that the counter has formulas for."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)  # they bring the fused recurrent layers
    enabled = [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:
            for library in libraries:
                library.enabled = False
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: the counter asks a module's inputs for theirs, and a view of one has none."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@final
@dataclass(frozen=True)
class Macs(Meter):
    """Multiply-adds of one real forward pass on the example; FLOPs are twice this.

    Counts products over a contracted axis: convolutions, matrix products, attention. Bias, normalisation, activations
    and pooling are not MACs. Attention runs by its plain products so that none is hidden in a fused call; if a fused
    call without a formula remains (recurrent layers), the pass is repeated without fusion. The rest is in `uncounted`.
    """

    @property
    def name(self) -> str:
        return "macs"

    def __call__(self, model: nn.Module, example: Any) -> Measurement:
        flops, uncounted = self._count(model, example, recurrent=False)
        if uncounted:
            flops, uncounted = self._count(model, example, recurrent=True)
        return Measurement(
            name=self.name,
            value=flops / 2,
            unit="MACs",
            definition="multiply-adds of convolutions, matrix products and attention in one forward pass on the "
            "example, counted by torch.utils.flop_counter (its FLOPs / 2)",
            device=device_name(device_of(model)),
            uncounted=tuple(sorted(uncounted)),
        )

    @staticmethod
    def _count(model: nn.Module, example: Any, *, recurrent: bool) -> tuple[int, set[str]]:
        # The counter is the inner mode: it takes composite calls apart before the recorder sees them.
        with evaluating(model), _without_gradients(model), _unfused(recurrent=recurrent):
            with _Unformulated() as recorder, FlopCounterMode(display=False) as counter:
                run(model, example)
            return int(counter.get_total_flops()), recorder.names
