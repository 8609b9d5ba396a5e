"""What a run will take, before anything is loaded: memory by part, seconds, whether it fits, and what would make it fit.

    spec -> base's configuration and rows, no torch -> question -> plan

`kivnun plan` asks of a spec on any device (`question_of`); `pipeline.py` asks of the run that it is about to begin, with what it
knows. Next: `verdict.py` (what is decided), `forecast.py` (what is foretold), `changes.py` (ways out).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from kivnun.data.loader import load_dataset
from kivnun.data.template import load_tokenizer
from kivnun.errors import BaseModelError, IntegrityError
from kivnun.lineage import start_of
from kivnun.model.families import NO_LIMIT, count_parameters, read_header, stored_precision
from kivnun.plan.bases import BaseFiles, base_files
from kivnun.plan.changes import changes_that_fit
from kivnun.plan.devices import Device, machine_memory
from kivnun.plan.rows import RunRows, estimated_rows, rows_of
from kivnun.plan.sizes import Sizes
from kivnun.plan.verdict import Plan, Question, chosen
from kivnun.run_folder import read_json_file
from kivnun.spec import MultiProcessSpec, ResolveFacts, TuneSpec
from kivnun.spec.adapters import AdapterSpec
from kivnun.spec.starting import StoredAdapter
from kivnun.spec.tune import OBJECTIVE_OF_FORMAT

CPU_INFO = Path("/proc/cpuinfo")
# What a processor needs for products in C (`model/kernels/products.c`), by the precision they read.
INSTRUCTIONS = {"fp32": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}
INSTRUCTIONS["bf16"] = INSTRUCTIONS["fp32"] | {"avx512_bf16"}


def make_plan(question: Question) -> Plan:
    """Return the plan of a run, with what would make it fit where it does not. Raises SpecError where the spec asks for what data,
    base or machine do not have."""
    plan = chosen(question)
    return replace(plan, changes=tuple(changes_that_fit(question))) if plan.verdict == "does_not_fit" else plan


def question_of(spec: TuneSpec, device: Device) -> Question:
    """Return what there is to plan in a spec: its rows are read, of its base the configuration alone. Loads no torch.

    Raises DataError for rows that cannot be used, BaseModelError for a base that is not to be found."""
    files = base_files(spec.base.model, spec.base.revision)
    return question_with(spec, device, files, _rows(spec, files, spec.data.max_seq_len or longest_of(files)))


def longest_of(files: BaseFiles) -> int:
    """Return the tokens of the longest row that a base takes, by its configuration."""
    longest = files.config.get("max_position_embeddings")
    return longest if isinstance(longest, int) else NO_LIMIT


def question_with(spec: TuneSpec, device: Device, files: BaseFiles, rows: RunRows) -> Question:
    """Return what there is to plan in a spec whose rows and base's configuration were read already."""
    sizes, unknown = sizes_or_reason(files.config, files.name)
    facts = ResolveFacts(
        objective_kind=OBJECTIVE_OF_FORMAT[rows.format],  # type: ignore[arg-type]
        max_seq_len=longest_of(files),
        longest_row=rows.longest,
        base_parameters=_parameters(files, sizes),
        device=device.kind,
        threads=max(1, device.cores),
        data_format=rows.format,  # type: ignore[arg-type]
        stored_precision=None if files.folder is None else stored_precision(files.folder),
        memory_bytes=round(machine_memory()),
        packs=_packs() if device.kind == "cpu" else frozenset(),
        rows_turn_from=files.turns_from if files.turns_from and rows.sides.max() > files.turns_from else None,
        start=_start(spec.adapter),
        local_processes=spec.compute.processes if isinstance(spec.compute, MultiProcessSpec) else 1,
        deepspeed=read_json_file(spec.compute.deepspeed)
        if isinstance(spec.compute, MultiProcessSpec) and spec.compute.deepspeed
        else None,
    )
    return Question(spec, facts, rows, device, sizes, unknown, files.turns_from)


def sizes_or_reason(config: Any, name: str) -> tuple[Sizes | None, str]:
    """Return a base's sizes, or None and why they are not known."""
    try:
        return Sizes.of(config, name), ""
    except BaseModelError as error:
        return None, error.message


def _start(adapter: AdapterSpec) -> StoredAdapter | None:
    """Return what the adapter that a spec starts from is, as its configuration and its tensors' names say; None: it starts anew."""
    start = start_of(adapter)
    if start is None:
        return None
    try:
        config = json.loads((start.folder / "adapter_config.json").read_text(encoding="utf-8"))
        names = [
            name.partition(".lora_A")[0] for name in read_header(start.folder / "adapter_model.safetensors") if ".lora_A" in name
        ]
        kind, targets = "dora" if config.get("use_dora") else "lora", sorted({name.rpartition(".")[2] for name in names})
        return StoredAdapter(
            kind, int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora")), tuple(filter(None, targets))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the adapter in {start.folder} cannot be read: {error}", hint="give a LoRA or DoRA in a folder as PEFT saves it"
        ) from error


def _rows(spec: TuneSpec, files: BaseFiles, max_seq_len: int) -> RunRows:
    if files.folder is None or not (files.folder / "tokenizer.json").is_file():
        return estimated_rows(spec.data)
    tokenizer = load_tokenizer(files.folder, spec.data.template)
    return rows_of(load_dataset(spec.data, tokenizer, spec.seed, max_seq_len))


def _parameters(files: BaseFiles, sizes: Sizes | None) -> int:
    """Return the base's numbers: as its files have them, else as its sizes or, where these are not known, its widths say."""
    if files.folder is not None:
        try:
            return count_parameters(files.folder)
        except BaseModelError:  # a configuration alone
            pass
    if sizes is not None:
        return sizes.numbers
    width, layers, words = (files.config.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if all(isinstance(it, int) for it in (width, layers, words)):  # 4 D^2 of attention and 8 D^2 of an MLP a layer, and the tables
        return 12 * cast(int, layers) * cast(int, width) ** 2 + 2 * cast(int, words) * cast(int, width)
    raise BaseModelError(
        f"the size of {files.name} cannot be told from its configuration", hint="download the base first: kivnun tune does"
    )


def _packs() -> frozenset[str]:
    """Return the precisions whose weights kernels in C read packed, as far as the processor tells."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = next((set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")), set[str]())
    return frozenset(precision for precision, needed in INSTRUCTIONS.items() if needed <= flags)
