"""What other programs load, from a finished run: the adapter for PEFT, or the whole model with the adapter folded in.

Nothing is handed out unchecked. An adapter is copied after its hashes were compared; a merged model is read back and compared
with base plus adapter on held-out rows, and is not left behind when it answers differently.
Shapes: S supervised positions, V vocabulary. Next: `verify.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivnun.artifacts import atomic_folder, check_manifest, hash_folder, read_manifest
from kivnun.data.packing import PackedBatch, pack
from kivnun.data.rows import PreferencePair, TokenRow, Trainable
from kivnun.errors import IntegrityError, RunFolderError
from kivnun.evaluate.card import Form, write_card
from kivnun.lineage import CARD, MERGE_RECORD
from kivnun.model.adapter_folder import load_peft
from kivnun.model.attention import Rows
from kivnun.model.families import base_hash, copy_tokenizer, stored_dtype
from kivnun.model.linear import ScalesBias
from kivnun.model.load import DTYPES, Base, load_base, load_decoded
from kivnun.model.sites import NormSite, PrefixSite, PromptSite, Site
from kivnun.opened import OpenedRun, open_run
from kivnun.spec.base import QUANTISED

GATE_ROWS = 32

# Mean KL divergence (nats per position) allowed between base plus adapter in float32 and the merged weights as they were stored.
# float32 leaves rounding of sums alone; bfloat16 rounds every weight to 8 bits, which cost 3e-5 on the built-in base.
MAX_KL = {"fp32": 1e-6, "bf16": 1e-3}


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike two models are on the same positions: mean KL (nats), and the share of positions with the same likeliest token."""

    kl: float
    greedy_agreement: float
    positions: int


def export_run(run_dir: Path, form: str, output: Path) -> dict[str, Any]:
    """Write `output` as "peft" or "merged" and return {run, form, folder} with what was checked.

    Raises RunFolderError when the output is there already or the run has no such form, IntegrityError when a hash differs or the
    merged model answers differently.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(f"{output} exists already", hint="choose another --output")
    run = open_run(run_dir)
    manifest = check_manifest(run.folder.path)
    said = manifest["base"]["content_hash"]
    if base_hash(run.base_folder) != said:
        raise IntegrityError(
            f"{run.base_folder} is not the base this run was tuned on: its content hash should be {said}",
            hint="bring back the base as it was, or tune again",
        )
    checks = export_peft(run, output) if form == "peft" else export_merged(run, output)
    return {"run": str(run_dir), "form": form, "folder": str(output), **checks}


def export_peft(run: OpenedRun, output: Path) -> dict[str, Any]:
    """Copy the adapter; return its hash, the same on both sides. Raises RunFolderError for full tuning, which has none."""
    if run.is_full:
        raise RunFolderError(
            f"{run.folder.path} trained the whole model, so there is no adapter", hint="export it with --to merged: a model folder"
        )
    with atomic_folder(output) as place:
        shutil.copytree(run.folder.adapter, place, dirs_exist_ok=True)
        copied, own = hash_folder(place), hash_folder(run.folder.adapter)
        if copied != own:
            raise IntegrityError(f"the copy of {run.folder.adapter} differs: {copied} instead of {own}", hint="try another disk")
        _add_card(run, place, "adapter")
    return {"content_hash": copied}


def export_merged(run: OpenedRun, output: Path) -> dict[str, Any]:
    """Write the whole model with the adapter folded in, in float32 arithmetic and the base's own storage type.

    Where the run held its base in codes, the adapter was trained on the decoded weights: it is folded into these, not into those
    they were made from, and the result is plain bfloat16.
    Raises IntegrityError when the base already holds this adapter, or when what was written answers differently.
    """
    if run.is_full:
        with atomic_folder(output) as place:
            shutil.copytree(run.folder.model, place, dirs_exist_ok=True)
            _add_card(run, place, "model")
        return {"content_hash": hash_folder(output)}
    adapter_hash = hash_folder(run.folder.adapter)
    _refuse_second_merge(run.base_folder, adapter_hash)
    held = run.spec.base.precision if run.spec.base.precision in QUANTISED else None
    precision = "bf16" if held else stored_dtype(run.base_folder)
    with atomic_folder(output) as place:
        base = _base_in_float32(run)
        _write_merged(base, run.folder.adapter, place, precision)
        # The adapter's folder holds the tokenizer and the template that the run used, wherever the user's file is by now.
        copy_tokenizer(run.folder.adapter, place, None)
        record = {"base_hash": base.content_hash, "adapter_hash": adapter_hash, "base": run.spec.base.model, "stored": precision}
        record |= {"decoded_from": held} if held else {}
        (place / MERGE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        likeness = _likeness(run, place)
        if likeness is not None and not likeness.kl <= MAX_KL[precision]:
            raise IntegrityError(
                f"the merged model answers differently: mean KL {likeness.kl:.2g} nats, {MAX_KL[precision]:.0e} is allowed",
                hint="use the adapter as it is (--to peft), or tune on a base that is stored in float32",
            )
        _add_card(run, place, "merged")
    gate = None if likeness is None else asdict(likeness)
    note = {"note": f"the base was held in {held}: the adapter is merged into its decoded weights, stored as bf16"} if held else {}
    return {"content_hash": hash_folder(output), "stored": precision, "gate": gate, **note}


def _add_card(run: OpenedRun, place: Path, form: Form) -> None:
    """Write the model card; one that came with the copy stays as it was made."""
    if not (place / CARD).is_file():
        write_card(run.folder.path, place, form, read_manifest(run.folder.path).get("lineage"))


def _base_in_float32(run: OpenedRun) -> Base:
    """Return the weights that the run's base computes with, dense and in float32."""
    spec = run.spec.base
    if spec.precision in QUANTISED:
        return load_decoded(run.base_folder, spec.precision, spec.rope_factors)
    return load_base(run.base_folder, "fp32", "cpu", spec.rope_factors)


def _write_merged(base: Base, adapter_folder: Path, place: Path, precision: str) -> None:
    """Fold the adapter into the base, which is not the pretrained one any more, and save it."""
    adapter = load_peft(base, adapter_folder)
    if adapter.no_merge is not None:
        raise RunFolderError(
            f"the adapter cannot be merged: {adapter.no_merge}", hint="export it as it is (--to peft), or tune with lora or dora"
        )
    fold_in(base, adapter.sites)
    base.model.to(DTYPES[precision])
    base.save(place)


@torch.no_grad()
def fold_in(base: Base, sites: Mapping[str, Site]) -> None:
    """Change the base's weights in place to what base plus adapter computes."""
    for name, site in sites.items():
        if isinstance(site, NormSite):
            for tensor, trained in site.tensors.items():
                base.model.get_submodule(name).get_parameter(tensor).copy_(trained)
            continue
        assert not isinstance(site, PromptSite | PrefixSite), "adapters that say why they cannot be merged are refused before"
        linear = base.linears[name]
        weight = linear.dense()
        weight.copy_(site.merged(weight))
        if linear.bias is not None and isinstance(site, ScalesBias):
            linear.bias.copy_(site.merged_bias(linear.bias))


def _refuse_second_merge(base_folder: Path, adapter_hash: str) -> None:
    record = base_folder / MERGE_RECORD
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("adapter_hash") == adapter_hash:
        raise IntegrityError(f"{base_folder} already holds this adapter", hint="use the folder as it is")


def _gate_rows(run: OpenedRun) -> list[TokenRow]:
    """Return up to GATE_ROWS held-out rows, or training rows where none is held out."""
    items: Sequence[Trainable] = run.dataset.validation or run.dataset.train.rows
    sides = [item.chosen if isinstance(item, PreferencePair) else item for item in items[:GATE_ROWS]]
    return [row for row in sides if row.total_weight > 0]


def _likeness(run: OpenedRun, merged: Path) -> Likeness | None:
    """Compare base plus adapter with the merged folder, both in float32, row by row: the logits of one row at a time are held."""
    base = _base_in_float32(run)
    sites = load_peft(base, run.folder.adapter).sites
    written = load_base(merged, "fp32", "cpu", run.spec.base.rope_factors)
    divergence, agreed, positions = 0.0, 0, 0
    for row in _gate_rows(run):
        p_SV, q_SV = _log_probs(base, sites, pack([row])), _log_probs(written, {}, pack([row]))
        divergence += float((p_SV.exp() * (p_SV - q_SV)).sum())
        agreed += int((p_SV.argmax(1) == q_SV.argmax(1)).sum())
        positions += len(p_SV)
    return Likeness(divergence / positions, agreed / positions, positions) if positions else None


@torch.no_grad()
def _log_probs(base: Base, sites: Mapping[str, Site], batch: PackedBatch) -> Tensor:
    """Return the log-probabilities [S, V] of every token at each supervised position, float64."""
    with base.using(sites):
        ids_T, positions_T, select_S = map(torch.from_numpy, (batch.ids_T, batch.positions_T, batch.select_S))
        h_SD = base.hidden(ids_T, positions_T, Rows(list(batch.lengths)), select_S)
        return torch.log_softmax(base.head(h_SD).double(), dim=1)
