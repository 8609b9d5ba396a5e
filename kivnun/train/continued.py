"""Training that goes on with an adapter: what is taken over of it, whether base and spec fit it, and its tensors.

The adapter is loaded as chat and export load it, so that the first pass computes what the finished run's model computes, to the
bit; moments and schedule start anew. Next: `lineage.py` (where the adapter is found), `new_weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kivnun.errors import BaseModelError, IntegrityError, SpecError
from kivnun.lineage import find_start, start_of
from kivnun.model.adapters import (
    MODULE_PREFIX,
    LowRankAdapter,
    load_low_rank,
    read_low_rank_shape,
    refuse_dropout_on_head,
    resolve_targets,
)
from kivnun.model.families import read_header, weight_files
from kivnun.model.load import Base
from kivnun.spec.adapters import AdapterSpec, LowRank
from kivnun.spec.starting import StoredAdapter

_A = ".lora_A.weight"


def stored_start(adapter: AdapterSpec, base_folder: Path) -> StoredAdapter | None:
    """Return what the adapter that a spec starts from is, None where it starts anew. Reads no weights.

    Raises IntegrityError where it is no LoRA or DoRA that can be trained, RunFolderError where there is none.
    """
    start = start_of(adapter)
    if start is None:
        return None
    shape = read_low_rank_shape(start.folder)
    return StoredAdapter(shape.kind, shape.rank, shape.alpha, shape.rslora, _target_names(_sites_in(start.folder), base_folder))


def check_start(spec: LowRank, base: Base) -> None:
    """Refuse an adapter of another base, or on other layers than the spec names. Raises IntegrityError, SpecError."""
    assert spec.start_from is not None
    start = find_start(spec.start_from)
    if start.base_hash is not None and start.base_hash != base.content_hash:
        raise IntegrityError(
            f"the adapter in {spec.start_from} was trained on another base: that had the content hash {start.base_hash}, "
            f"{base.name} has {base.content_hash}",
            hint="set base to the model the adapter was trained on",
        )
    wanted, stored = set(resolve_targets(base, spec.target_modules)), set(_sites_in(start.folder))
    if strange := sorted(stored - set(base.linears)):
        raise BaseModelError(
            f"the adapter in {spec.start_from} covers {strange[0]}, which {base.name} does not have",
            hint="set base to the model the adapter was trained on",
        )
    if wanted != stored:
        lacking = [f"lacks {name}" for name in sorted(wanted - stored)] + [f"covers {name}" for name in sorted(stored - wanted)]
        raise SpecError(
            f"adapter.target_modules differs from the adapter in {spec.start_from}, which {', '.join(lacking[:4])}"
            + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""),
            hint="leave target_modules out to take the adapter's over",
        )


def open_start(spec: LowRank, base: Base, seed: int) -> LowRankAdapter:
    """Return the adapter that the spec starts from, ready to train with the spec's own dropout."""
    assert spec.start_from is not None
    adapter = load_low_rank(base, find_start(spec.start_from).folder, seed, spec.dropout)
    refuse_dropout_on_head(base, adapter.shape)
    return adapter


def _sites_in(folder: Path) -> list[str]:
    """Return the layers of an adapter, in its file's order."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise IntegrityError(f"{folder} holds no adapter_model.safetensors", hint="give a PEFT adapter folder as PEFT saves it")
    return [name.removeprefix(MODULE_PREFIX).removesuffix(_A) for name in read_header(path) if name.endswith(_A)]


def _target_names(sites: Sequence[str], base_folder: Path) -> tuple[str, ...]:
    """Return the ends of the layers' names where they mean these layers and no others in this base, else the whole names."""
    ends = sorted({site.rpartition(".")[2] for site in sites})
    stored = {name.removesuffix(".weight") for file in weight_files(base_folder) for name in read_header(file)}
    meant = {name for name in stored if name.rpartition(".")[2] in ends}
    return tuple(ends) if meant == set(sites) else tuple(sorted(sites))
