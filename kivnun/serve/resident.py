"""A configured base in memory, ready to answer: in the precision that training takes it in, on the device there is.

Next: `scheduler.py` (who answers), `adapter_files.py` (how adapters come onto it).
"""

from __future__ import annotations

import hashlib

import torch

from kivnun.artifacts import code_hash
from kivnun.errors import BaseModelError
from kivnun.jobs.config import ServiceConfig
from kivnun.model.families import count_parameters, find_base, read_config
from kivnun.model.load import load_base
from kivnun.plan.devices import CONTEXT_BYTES, find_device
from kivnun.plan.serving import MOST_ADAPTER_BYTES, served_precision, serving_of
from kivnun.serve.adapter_files import load_adapter
from kivnun.serve.adapters import AdapterCache, AdapterFolders
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.scheduler import Capacity, Scheduler

LEAST_TOKENS = 1 << 14  # in the cache, of a base whose tokens are of a size that is not known


def load_resident(config: ServiceConfig, name: str, folders: AdapterFolders, memory_bytes: float | None = None) -> Scheduler:
    """Return what answers for a configured base. It takes `memory_bytes` at most, unless the base alone takes more; by default what
    the device has. Raises BaseModelError where the base cannot be loaded."""
    entry = config.bases[name]
    folder = find_base(config.model_of(name), entry.revision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = count_parameters(folder)
    precision = served_precision(entry.precision, folder, numbers, device)
    base = load_base(folder, precision, device)
    version = hashlib.sha256(f"{base.content_hash} {precision} {device} {code_hash()}".encode()).hexdigest()
    try:
        takes = serving_of(read_config(folder), name, precision, device, numbers)
    except BaseModelError:  # its configuration has other names than any that is known
        held_tokens, adapter_bytes = LEAST_TOKENS, MOST_ADAPTER_BYTES
    else:
        memory_bytes = _device_bytes(device) if memory_bytes is None else memory_bytes
        held_tokens, adapter_bytes = takes.held_tokens(memory_bytes), takes.adapter_bytes(memory_bytes)
    adapters = AdapterCache(folders.fetched, lambda place: load_adapter(base, place), max_bytes=adapter_bytes)
    return Scheduler(name, version, base, BaseTokens(folder), adapters, Capacity(held_tokens=held_tokens))


def _device_bytes(device: str) -> float:
    """Return what a worker may take of the device that torch found."""
    if device == "cpu":
        return find_device("cpu").memory_bytes
    return torch.cuda.get_device_properties(0).total_memory - CONTEXT_BYTES
