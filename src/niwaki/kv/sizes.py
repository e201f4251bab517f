"""How many bytes a cache really holds: distinct storages, so that neither views nor shared tensors deceive."""

from collections.abc import Iterable

from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors; a slice counts as the whole tensor it keeps alive."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
