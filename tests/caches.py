"""What a cache holds, whatever it says."""

import gc

import torch


def reachable_bytes(cache):
    """The storages that the garbage collector finds from a cache's layers, but for classes and whole modules."""
    seen, storages, todo = set(), {}, list(cache.layers)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type) or type(one).__name__ in ("module", "function"):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            todo += list(vars(one).values())
            if type(one) is torch.Tensor and one.dtype != torch.int64:
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(one)
    return sum(storages.values())
