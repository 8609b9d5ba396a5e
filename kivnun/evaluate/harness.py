"""EleutherAI's lm-evaluation-harness with our models: its tasks as they are, its requests answered by `forward` and `sample`.

The harness asks three things: the log-probability of a text after another, the log-probability of a running text, and a text that
goes on from a prompt. Ids, windows, cuts and stops are those of its own Hugging Face backend (lm_eval 0.4.13,
models/huggingface.py), so that figures can be compared with published ones. What differs is how they are computed: rows are packed,
and what the answers to one question begin with is computed once. The only module that imports lm_eval, which is an extra.
Next: `kivnun/model/generate.py`, `multiple_choice.py` (the same sums for our own files).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kivnun.data.packing import PackedBatch, micro_batches, pack
from kivnun.data.rows import TokenRow, Where
from kivnun.data.template import ChatTokenizer
from kivnun.errors import DataError, SpecError
from kivnun.evaluate.intervals import Interval, Verdict, difference_interval, verdict_of
from kivnun.evaluate.metrics import Measure
from kivnun.model.families import NO_LIMIT
from kivnun.model.generate import OnToken, SamplingParams

DRAWS, SEED = 2_000, 7
# What the harness's own backend takes of a generation's options; any other would be ignored, and the figure not the task's.
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
DEFAULT_NEW_TOKENS = 256
UNKNOWN_LONGEST = 2048

Progress = Callable[[str, int, int], None]
Asked = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts that are asked about, the ids of what comes before and of what is scored."""


class Answering(Protocol):
    """What the harness needs of a model."""

    def forward_and_choice(self, batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Return each target's log-probability (float32 [S]) and whether no token is likelier (bool [S])."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, on_token: OnToken | None = None
    ) -> list[list[int]]: ...


class HarnessModel(TemplateLM):
    """A model of ours as the harness sees one. `longest` is the longest row that the base takes."""

    def __init__(
        self,
        model: Answering,
        tokenizer: ChatTokenizer,
        longest: int,
        micro_batch_tokens: int,
        on_progress: Progress | None = None,
        *,
        reads_past_end: bool = True,
        shares_up_to: int = NO_LIMIT,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._longest = UNKNOWN_LONGEST if longest == NO_LIMIT else longest
        # The last token of a row is scored, not read: a row may hold one more than the base reads, unless positions are a table.
        self._longest_scored = self._longest + reads_past_end
        self._shares_up_to = shares_up_to  # above, LongRoPE turns rows by their length, and beginnings are no longer alike
        self._micro_batch_tokens = micro_batch_tokens
        self._on_progress = on_progress or (lambda what, done, total: None)

    # --- what the harness asks of the tokenizer -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text without a context: BOS where the tokenizer names one, else EOS."""
        tokens = self._tokenizer.tokens
        return tokens.added_tokens.get(tokens.special_tokens.get("bos_token", ""), self._tokenizer.eos_id)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.tokens.folder.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokens = self._tokenizer.tokens
        return tokens.encode_plain(string) if add_special_tokens is False else tokens.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise SpecError(f"the base has one chat template, none named {chat_template!r}", hint="leave the name out")
        return self._tokenizer.template_source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as the text that a reply follows; without a prompt for one, what its last message has begun."""
        if add_generation_prompt:
            return self._tokenizer.prompt_text(chat_history)
        return self._tokenizer.prompt_text(chat_history[:-1]) + chat_history[-1]["content"]

    # --- its three questions ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(  # pyright: ignore[reportIncompatibleMethodOverride]  # texts are None where a running text is scored, there as here
        self, requests: list[Asked], **options: Any
    ) -> list[tuple[float, bool]]:
        rows = [_scored_row(before, scored, self._longest_scored, at) for at, (_, before, scored) in enumerate(requests)]
        sums, greedy = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)
        done = 0
        share = max((row.length for row in rows), default=0) <= self._shares_up_to
        for run in micro_batches(rows, self._micro_batch_tokens, share):
            batch = pack(run, share)
            log_probs_S, likeliest_S = self._model.forward_and_choice(batch)
            own, count = list(batch.rows), len(batch.rows)
            sums[own] = np.bincount(batch.segment_S, weights=log_probs_S.astype(np.float64), minlength=count)
            greedy[own] = np.bincount(batch.segment_S, weights=~likeliest_S, minlength=count) == 0
            done += len(run)
            self._on_progress("scoring", done, len(rows))
        answers = [(float(total), bool(best)) for total, best in zip(sums, greedy, strict=True)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, cut into windows of which each token is scored once."""
        windows: list[Asked] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self._longest, context_len=1)
            for before, scored in map(make_disjoint_window, rolling):
                windows.append((None, list(before), list(scored)))
                owners.append(number)
        sums = [total for total, _ in self._loglikelihood_tokens(windows)]
        totals = np.bincount(owners, weights=sums, minlength=len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what goes on from each prompt, up to the first of its stops or its most tokens."""
        texts: list[str] = []
        for number, request in enumerate(requests):
            context, given = cast("tuple[str, dict[str, Any]]", request.args)
            texts.append(self._continue(context, given))
            self.cache_hook.add_partial("generate_until", (context, given), texts[-1])
            self._on_progress("generating", number + 1, len(requests))
        return texts

    def _continue(self, context: str, given: Mapping[str, Any]) -> str:
        options: dict[str, Any] = {**normalize_gen_kwargs(dict(given), DEFAULT_NEW_TOKENS)}
        _refuse_other_options(options)
        stops = handle_stop_sequences(options.get("until"), eos=self._tokenizer.decode([self.eot_token_id]))
        new_tokens = int(options["max_gen_toks"])
        room = self._longest - new_tokens
        if room < 1:
            raise SpecError(
                f"the task generates up to {new_tokens:,} tokens, the base takes {self._longest:,} in all",
                hint="give fewer with --gen-kwargs max_gen_toks=N",
            )
        prompt = self.tok_encode(context)[-room:]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        params = SamplingParams(new_tokens, (self.eot_token_id,), temperature, float(options.get("top_p") or 1.0), SEED)
        produced: list[int] = []

        def heard(_row: int, token: int) -> bool:
            produced.append(token)
            text = self._tokenizer.decode(produced)
            return any(stop and stop in text for stop in stops)

        ids = self._model.sample([prompt], params, heard)[0]
        text = self._tokenizer.decode(ids, skip_special=True)
        return postprocess_generated_text(text, stop=stops, think_end_token=None)


def _scored_row(before: Sequence[int], scored: Sequence[int], longest: int, number: int) -> TokenRow:
    """Return a row whose last ids are scored, cut at its beginning to `longest` tokens."""
    ids = [*before, *scored][-longest:]
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[max(len(ids) - len(scored), 1) :] = 1.0
    return TokenRow(np.array(ids, dtype=np.int32), weights, number, Where("lm-evaluation-harness", number + 1), 0)


def _refuse_other_options(options: Mapping[str, Any]) -> None:
    odd = {name: value for name, value in options.items() if name not in GENERATION and value is not None}
    if odd:
        raise SpecError(
            f"the task generates with {', '.join(f'{name}={value}' for name, value in odd.items())}, which is not offered",
            hint=f"offered are {', '.join(GENERATION)}",
        )


# --- whole tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tasks:
    """Which tasks, and how they are asked: by name in the harness or in `folder`; as chats, with examples, the first rows alone."""

    names: tuple[str, ...]
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    gen_kwargs: str | None = None


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What one model got: the harness's own results and, for each (task, metric), the value of each row."""

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    rows: dict[tuple[str, str], np.ndarray]
    higher_is_better: dict[tuple[str, str], bool]


def score_tasks(model: HarnessModel, tasks: Tasks) -> TaskScores:
    """Run the harness. Raises SpecError for a task that it does not know, DataError where a task's data cannot be had."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()  # ours are shown
    # It asks git for the commit of the current folder, which prints git's complaint where that is none.
    evaluator.get_git_commit_hash = lambda: None
    manager = _manager(tasks)
    try:
        found: Any = evaluator.simple_evaluate(  # its decorators hide its parameters from type checkers
            model=model,
            tasks=list(tasks.names),
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            apply_chat_template=tasks.chat,
            fewshot_as_multiturn=tasks.chat,
            gen_kwargs=tasks.gen_kwargs,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(
            f"the data of {', '.join(tasks.names)} cannot be had: {type(error).__name__}: {error}",
            hint="check the network; a task's data are downloaded from the model hub on first use",
        ) from error
    assert found is not None
    rows = _per_row(found)
    better = {key: bool(found["higher_is_better"][key[0]].get(key[1].partition(",")[0], True)) for key in rows}
    return TaskScores(dict(found["results"]), dict(found["versions"]), rows, better)


def _manager(tasks: Tasks) -> TaskManager:
    """Return where the tasks are found: in the given folder alone where that has all, since reading the harness's takes seconds."""
    if tasks.folder is not None:
        own = TaskManager(include_path=str(tasks.folder), include_defaults=False)
        if set(tasks.names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    refuse_unknown(tasks.names, set(manager.all_tasks))
    return manager


def refuse_unknown(names: Sequence[str], known: set[str]) -> None:
    """Raise SpecError for names that are not among the known ones, with those nearest to the first."""
    unknown = [name for name in names if name not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=3)
        raise SpecError(
            f"the harness knows no task {', '.join(map(repr, unknown))}",
            hint=f"did you mean {' or '.join(near)}?"
            if near
            else "lm-eval ls tasks prints all; --include-path adds a folder of yours",
        )


def _per_row(found: Mapping[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    """Return each row's value of every metric whose figure is the mean over rows."""
    rows: dict[tuple[str, str], np.ndarray] = {}
    for task, samples in found["samples"].items():
        for key, figure in found["results"][task].items():
            metric, _, filtered = key.partition(",")
            own = [sample for sample in samples if sample.get("filter", filtered) == filtered]
            values = [sample.get(metric) for sample in sorted(own, key=lambda sample: sample["doc_id"])]
            if values and all(isinstance(value, int | float) for value in values):
                array = np.array(values, dtype=np.float64)
                if np.isclose(array.mean(), figure, rtol=1e-9, atol=1e-12):
                    rows[task, key] = array
    return rows


@dataclass(frozen=True, slots=True)
class Difference:
    """Tuned minus base of one metric, paired over the same rows."""

    value: float
    interval: Interval | None
    verdict: Verdict


def differences(base: TaskScores, tuned: TaskScores) -> dict[tuple[str, str], Difference]:
    """Return tuned minus base for each (task, metric) that both have row by row."""
    found: dict[tuple[str, str], Difference] = {}
    for key in base.rows.keys() & tuned.rows.keys():
        before, after = (Measure("mean", np.stack([v, np.ones_like(v)], axis=1)) for v in (base.rows[key], tuned.rows[key]))
        interval = difference_interval(before, after, DRAWS, SEED)
        found[key] = Difference(after.figure - before.figure, interval, verdict_of(interval, base.higher_is_better[key]))
    return found
