"""The screen shows what the events hold, as lines where there is no terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from kivnun.cli import screen
from kivnun.events import (
    AdapterOpened,
    BaseLoaded,
    CheckpointSaved,
    DataLoaded,
    Evaluated,
    Event,
    Planned,
    Resumed,
    RunFinished,
    RunInterrupted,
    RunStarted,
    StepDone,
    Warned,
)

STEPS = 40


def step(number: int, seconds: float = 1.0) -> StepDone:
    return StepDone(number, STEPS, 0, 2.5 / number, 1.0, 1e-3, 8, 800, 400, 800, seconds)


def events() -> Iterator[Event]:
    yield RunStarted("demo", "0" * 64)
    yield DataLoaded("messages", 800, 200, 64_000, 20_000, 3, 0)
    yield Planned(480 * 2**20, {"process": 400 * 2**20, "weights": 80 * 2**20}, 58.0, STEPS)
    yield BaseLoaded("kivnun/tiny-phi", 3_800_000, "fp32", "0" * 64, 0.5)
    yield AdapterOpened("lora", 120_000, {"qkv_proj": 4, "o_proj": 4}, 8)
    yield Evaluated("base", 0, 4.25, 200, {"exact_match": 0.01, "chrf": 12.34}, {}, [])
    for number in range(1, STEPS + 1):
        yield step(number)
        if number == 20:
            yield CheckpointSaved(20, "checkpoints/step-000020", 0.1)
            yield Warned("the disk is [nearly] full")
    yield Evaluated("tuned", STEPS, 0.25, 200, {"exact_match": 0.985}, {}, [])
    yield RunFinished("succeeded", STEPS, 16_000, 64.4, 512 * 2**20)


def plain(clock: Iterator[float]) -> tuple[screen.PlainScreen, io.StringIO]:
    text = io.StringIO()
    return screen.PlainScreen(Console(file=text, markup=False, highlight=False, soft_wrap=True), lambda: next(clock)), text


def test_plain_lines_tell_the_whole_story() -> None:
    shown, text = plain(iter(float(second) for second in range(1, 1000)))
    with shown:
        for event in events():
            shown(event)
    lines = text.getvalue().splitlines()
    assert lines[0] == "data: messages, 800 rows to train on (64,000 tokens, 20,000 trained), 200 held out, 3 skipped"
    assert lines[1] == "plan: 40 steps, 0:58, 480 MiB at most"
    assert lines[2] == "base: kivnun/tiny-phi, 3,800,000 parameters, fp32"
    assert lines[3] == "adapter: lora, 120,000 trained parameters at 8 modules (qkv_proj x4, o_proj x4)"
    assert lines[4] == "held out, base: nll 4.2500, exact_match 1.0 %, chrf 12.3 (200 rows)"
    assert lines[5] == "step 1/40  loss 2.500  800 tokens/s  0:39 left"
    assert "note: the disk is [nearly] full" in lines
    assert lines[-2] == "held out, after step 40: nll 0.2500, exact_match 98.5 % (200 rows)"
    assert lines[-1] == "finished: 40 steps, 16,000 trained tokens, 1:04, 512 MiB at most (foretold: 0:58, 480 MiB at most)"


def test_plain_steps_are_thinned_out_by_time_but_first_and_last_are_shown() -> None:
    shown, text = plain(iter(float(second) for second in range(1, 1000)))
    for number in range(1, STEPS + 1):
        shown(step(number))
    numbers = [int(line.split()[1].split("/")[0]) for line in text.getvalue().splitlines()]
    assert numbers == [1, 6, 11, 16, 21, 26, 31, 36, 40]


def test_time_left_counts_from_the_step_at_which_this_process_began() -> None:
    shown, text = plain(iter([100.0]))
    shown(step(30, seconds=2.0))
    assert text.getvalue() == "step 30/40  loss 0.083  400 tokens/s  0:20 left\n"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Resumed(20, "checkpoints/step-000020"), "resumed after step 20"),
        (Resumed(0, ""), "no checkpoint yet: the run starts over"),
        (Planned(2**30, {"process": 2**30}, float("nan"), 12), "plan: 12 steps, 1,024 MiB at most"),
        (RunInterrupted(21), "stopped after step 21; its state is saved"),
        (CheckpointSaved(20, "x", 0.1), None),
    ],
)
def test_an_event_is_one_line(event: Event, line: str | None) -> None:
    assert screen.describe(event) == line


def test_the_live_screen_draws_a_bar_and_leaves_the_lines() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, markup=False, highlight=False)
    with screen.LiveScreen(console) as shown:
        for event in events():
            shown(event)
    drawn = text.getvalue()
    assert "finished: 40 steps" in drawn
    assert "held out, base" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in drawn  # the cursor is back


def test_phases_follow_what_was_done() -> None:
    phases = [phase for event in events() if (phase := screen.next_phase(event)) is not None]
    assert phases == ["reading data", "loading the base", "scoring the base", "scoring the base", "training"]


def test_a_table_is_never_cut_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    screen.table(("name", "count"), [("x" * 300, "12"), ("y", "3")], Console(file=text, width=80))
    assert "x" * 300 in text.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (205, "3:25"), (3723, "1:02:03")])
def test_clock_time(seconds: float, text: str) -> None:
    assert screen.clock_time(seconds) == text
