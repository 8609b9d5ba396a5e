"""A run, opened for use: its rows, its base and its result, for evaluation, chat, export and verification.

Everything is read when it is first asked for: a chat loads no data, a look at the data loads no model.
Next: `evaluate/evaluation.py`, `export/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch

from kivnun.data.loader import Dataset, load_dataset
from kivnun.data.template import ChatTokenizer, load_tokenizer
from kivnun.errors import IntegrityError, RunFolderError
from kivnun.evaluate.evaluation import Evaluation, StageProgress, evaluate_scorer
from kivnun.evaluate.forgetting import open_probe
from kivnun.model.adapter_folder import load_peft
from kivnun.model.families import count_parameters, find_base, stored_precision
from kivnun.model.load import Base, load_base
from kivnun.run_folder import RunFolder
from kivnun.spec import FullSpec, TuneSpec
from kivnun.spec.resolve import SMALL_BASE
from kivnun.train.engine import FixedModel, TorchEngine


@dataclass(frozen=True)
class OpenedRun:
    """A run's folder and spec; the rest on demand."""

    folder: RunFolder
    spec: TuneSpec

    @property
    def is_full(self) -> bool:
        """Return whether the whole model was trained, so that the result is a model of its own."""
        return isinstance(self.spec.adapter, FullSpec)

    @cached_property
    def base_folder(self) -> Path:
        return find_base(self.spec.base.model, self.spec.base.revision)

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        return load_tokenizer(self.base_folder, self.spec.data.template)

    @property
    def trained_on_chats(self) -> bool:
        """Return whether rows were rendered as conversations, so that the model is to be asked as one answers in a chat."""
        return self.spec.data.format not in ("prompt_completion", "text") and self.tokenizer.has_template

    @cached_property
    def dataset(self) -> Dataset:
        """Return the rows as they were; the files must still be where the spec says."""
        return load_dataset(self.spec.data, self.tokenizer, self.spec.seed, cast(int, self.spec.data.max_seq_len))

    @cached_property
    def base(self) -> Base:
        """Return the pretrained model, in the precision and with the threads of the run."""
        return self._load(self.base_folder, self.spec.base.content_hash)

    @cached_property
    def base_model(self) -> FixedModel:
        return TorchEngine(self.base).base_model()

    @cached_property
    def tuned(self) -> FixedModel:
        """Return the tuned model: the base with the run's adapter, or the run's own weights."""
        if self.is_full:
            return TorchEngine(self._load(self._existing(self.folder.model))).base_model()
        adapter = load_peft(self.base, self._existing(self.folder.adapter))
        return TorchEngine(self.base).with_adapter(adapter)

    def evaluate(self, on_progress: StageProgress | None = None) -> tuple[Evaluation, Evaluation]:
        """Return the scores of base and tuned on the held-out rows, computed anew."""
        base = self._score(self.base_model, None, on_progress)
        return base, self._score(self.tuned, base, on_progress)

    def _score(self, model: FixedModel, base: Evaluation | None, on_progress: StageProgress | None) -> Evaluation:
        spec, tokens = self.spec, cast(int, self.spec.compute.micro_batch_tokens)
        rows, probe = (
            self.dataset.validation,
            open_probe(spec.evaluation.forgetting, self.tokenizer, cast(int, spec.data.max_seq_len)),
        )
        return evaluate_scorer(
            model, rows, self.tokenizer, spec.evaluation, spec.seed, on_progress, micro_batch_tokens=tokens, base=base, probe=probe
        )

    @property
    def kernels(self) -> str:
        """Return which kernels to use: torch's where the run did, else the best there are here, which may be another machine."""
        return "torch" if self.spec.compute.kernels == "torch" else "auto"

    def _load(self, place: Path, content_hash: str | None = None) -> Base:
        torch.set_num_threads(cast(int, self.spec.compute.threads))
        spec = self.spec.base
        packed = bool(self.spec.compute.packed_weights)
        return load_base(
            place,
            spec.precision,
            self.spec.compute.device,
            spec.rope_factors,
            kernels=self.kernels,
            packed=packed,
            content_hash=content_hash,
        )

    def _existing(self, place: Path) -> Path:
        if not place.is_dir():
            raise RunFolderError(f"{self.folder.path} has no {place.name} yet", hint="finish the run with --resume")
        return place


@dataclass(frozen=True)
class OpenedBase:
    """A base as it is, on the device and in the precision that a run would choose by itself."""

    folder: Path

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        return load_tokenizer(self.folder)

    @cached_property
    def base(self) -> Base:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        small = device == "cpu" and count_parameters(self.folder) < SMALL_BASE
        return load_base(self.folder, stored_precision(self.folder) or ("fp32" if small else "bf16"), device)

    @cached_property
    def base_model(self) -> FixedModel:
        return TorchEngine(self.base).base_model()


def open_base(model: str) -> OpenedBase:
    """Return a base by its id or folder. Raises BaseModelError when it is nowhere to be found."""
    return OpenedBase(find_base(model))


def open_run(run_dir: Path) -> OpenedRun:
    """Return a run opened for use. Raises RunFolderError when the folder holds none, IntegrityError when it lacks a choice."""
    folder = RunFolder(run_dir)
    spec = folder.read_spec()
    if spec.compute.threads is None or spec.base.precision == "auto":
        raise IntegrityError(f"{folder.resolved} leaves choices open: it was not written by a run", hint="tune again")
    return OpenedRun(folder, spec)
