"""A configured base in memory, ready to answer: in the precision that training takes it in, on the device there is.

Next: `scheduler.py` (who answers), `adapter_files.py` (how adapters come onto it).
"""

from __future__ import annotations

import hashlib

import torch

from kivnun.artifacts import code_hash
from kivnun.jobs.config import ServiceConfig
from kivnun.model.families import count_parameters, find_base, stored_precision
from kivnun.model.load import load_base
from kivnun.serve.adapter_files import load_adapter
from kivnun.serve.adapters import AdapterCache, AdapterFolders
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.scheduler import Scheduler
from kivnun.spec.resolve import SMALL_BASE


def load_resident(config: ServiceConfig, name: str, folders: AdapterFolders) -> Scheduler:
    """Return what answers for a configured base. Raises BaseModelError where it cannot be loaded."""
    entry = config.bases[name]
    folder = find_base(config.model_of(name), entry.revision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = entry.precision
    if precision == "auto":  # as a run resolves it (spec/resolve.py)
        small = device == "cpu" and count_parameters(folder) < SMALL_BASE
        precision = stored_precision(folder) or ("fp32" if small else "bf16")
    base = load_base(folder, precision, device)
    version = hashlib.sha256(f"{base.content_hash} {precision} {device} {code_hash()}".encode()).hexdigest()
    adapters = AdapterCache(folders.fetched, lambda place: load_adapter(base, place))
    return Scheduler(name, version, base, BaseTokens(folder), adapters)
