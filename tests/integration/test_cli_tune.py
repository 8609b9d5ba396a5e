"""The commands from end to end, on a base of two layers: what is on stdout, on stderr, on disk, and in the exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kivnun.cli.main import run
from tiny_task import HEBREW, PROGRAM, WORDS, make_spec


@pytest.fixture(scope="module")
def spec(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_spec(tmp_path_factory.mktemp("task"), base)


@pytest.fixture(scope="module")
def tuned(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run and what `tune --json` wrote, from a process of its own as a user starts it."""
    place = tmp_path_factory.mktemp("here")
    return place / "runs" / "words", kivnun(["tune", str(spec), "--json"], place)


def kivnun(args: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*PROGRAM, *args], cwd=place, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_tune_writes_one_object_to_stdout_and_the_story_to_stderr(
    tuned: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = tuned
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.count("\n") == 1
    assert set(result) == {"run", "status", "steps", "trained_tokens", "base", "tuned", "plan", "actual"}
    assert (result["status"], result["steps"]) == ("succeeded", 16)
    assert result["actual"]["peak_bytes"] > 0
    assert result["tuned"]["nll"] < result["base"]["nll"]
    assert {"exact_match", "chrf"} <= set(result["tuned"])
    for part in ("data: messages, 32 rows", "base: ", "adapter: lora", "step 1/16", "step 16/16", "finished: 16 steps"):
        assert part in done.stderr
    assert (folder / "adapter" / "adapter_config.json").is_file()


def test_a_run_that_exists_is_refused_and_with_resume_its_result_is_printed_again(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, done = tuned
    assert run(["tune", str(spec), "--output", str(folder), "--json"]) == 5
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["code"] == "run_folder"
    assert run(["tune", str(spec), "--output", str(folder), "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    first = json.loads(done.stdout.splitlines()[-1])
    assert {**again, "run": ""} == {**first, "run": ""}


def test_the_final_screen_has_the_comparison_the_samples_and_the_next_commands(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = tuned
    assert run(["tune", str(spec), "--output", str(folder), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "exact_match" in out
    assert "nll" in out
    assert out.count("reference  ") == 2
    assert any(word in out for word in HEBREW)
    assert f"kivnun chat {folder}" in err


def test_evaluate_finds_the_scores_of_the_run(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, done = tuned
    assert run(["evaluate", str(folder), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    first = json.loads(done.stdout.splitlines()[-1])
    for which in ("base", "tuned"):
        assert scores[which]["nll"] == pytest.approx(first[which]["nll"], abs=1e-6)
        assert scores[which]["exact_match"] == first[which]["exact_match"]


def test_chat_streams_what_it_returns(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = tuned
    assert run(["chat", str(folder), "--once", "three 2", "--max-new-tokens", "8"]) == 0
    streamed = capsys.readouterr().out
    assert run(["chat", str(folder), "--once", "three 2", "--max-new-tokens", "8", "--json"]) == 0
    reply = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert streamed == reply["reply"] + "\n"
    assert reply["finish_reason"] in ("stop", "length")
    assert 0 < reply["tokens"] <= 8
    assert run(["chat", str(folder), "--once", "three 2", "--max-new-tokens", "8", "--base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reply"] != reply["reply"]


def test_a_conversation_is_read_from_stdin(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one 1", "/new", "two 2"])

    def read(_prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert run(["chat", str(tuned[0]), "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_data_show_marks_exactly_the_replies_and_loads_no_torch(spec: Path) -> None:
    program = (
        "import sys; from kivnun.cli.main import run; status = run(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "data", "show", str(spec), "--rows", "2"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "False")
    shown = json.loads(done.stdout)
    for row in shown["rows"]:
        number = row["line"] - 1
        assert row["trained"] == [f"{HEBREW[number % 8]} {number // 8}<|end|>"]
        assert len(row["ids"]) == len(row["weights"]) == row["tokens"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert plain.stdout.count("⟦") == 2
    assert "<|end|>⟧" in plain.stdout


def test_data_show_names_the_sides_of_a_preference(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": [{"role": "user", "content": "one"}], "chosen": "אחת", "rejected": "שתיים"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n"), encoding="utf-8")
    (tmp_path / "spec.yaml").write_text(
        f"{{version: 1, base: {base}, data: {{train: pairs.jsonl, validation: null}}}}", encoding="utf-8"
    )
    assert run(["data", "show", str(tmp_path / "spec.yaml"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["part"], row["trained"]) for row in shown["rows"]] == [("chosen", ["אחת<|end|>"]), ("rejected", ["שתיים<|end|>"])]
    assert run(["data", "show", str(tmp_path / "spec.yaml")]) == 0
    assert "rejected reply, " in capsys.readouterr().out


def test_a_run_on_prompts_is_talked_to_with_prompts(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(json.dumps({"prompt": f"{word}:", "completion": f" {word}"}) + "\n" for word in WORDS)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    tree = yaml.safe_load(spec.read_text(encoding="utf-8"))
    tree["data"] = {"train": "rows.jsonl", "validation": None}
    tree["evaluation"] = {"metrics": []}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    folder = str(tmp_path / "run")
    assert run(["tune", str(tmp_path / "spec.yaml"), "--output", folder]) == 0
    assert "held-out rows" not in capsys.readouterr().out
    assert run(["chat", folder, "--once", "one:", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] >= 1
    assert run(["chat", folder, "--once", "one:", "--system", "be brief"]) == 2
    assert "trained on plain prompts" in capsys.readouterr().err
    assert run(["evaluate", folder]) == 3


def test_text_that_is_not_utf_8_is_refused(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", str(tuned[0]), "--once", "\udcff"]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_output_is_utf_8_whatever_the_locale(spec: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([*PROGRAM, "data", "show", str(spec)], env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0
    assert HEBREW[0] in done.stdout.decode("utf-8")


def test_data_check_lists_every_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    (tmp_path / "rows.jsonl").write_text("\n".join([good, "{", good, '{"prompt": "a"}']) + "\n", encoding="utf-8")
    assert run(["data", "check", str(tmp_path / "rows.jsonl"), "--json"]) == 3
    out, err = capsys.readouterr()
    assert [problem["line"] for problem in json.loads(out)["error"]["problems"]] == [2, 4]
    assert "rows.jsonl:2:" in err
    (tmp_path / "rows.jsonl").write_text(good + "\n", encoding="utf-8")
    assert run(["data", "check", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


def test_set_overrides_the_spec(spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("adapter.rank=2", "schedule.epochs=1", "evaluation.metrics=[]", "evaluation.samples=0")
    sets = [part for value in wanted for part in ("--set", value)]
    assert run(["tune", str(spec), "--output", str(tmp_path / "run"), *sets, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 8
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 2


def test_verify_says_that_the_run_reproduces_and_finds_a_changed_file(
    tuned: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tuned[0], copy)
    assert run(["verify", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"]
    assert {"files", "held-out score", "first steps"} <= {check["name"] for check in found["checks"]}
    with (copy / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert run(["verify", str(copy)]) == 8
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert "adapter_model.safetensors was changed" in out
    assert "integrity: " in err


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_export_writes_a_folder_once(
    form: str, tuned: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert run(["export", str(tuned[0]), "--to", form, "--output", str(made), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["form"], result["folder"]) == (form, str(made))
    before = sorted(path.name for path in made.iterdir())
    assert ("adapter_config.json" if form == "peft" else "config.json") in before
    assert run(["export", str(tuned[0]), "--to", form, "--output", str(made)]) == 5
    assert sorted(path.name for path in made.iterdir()) == before


@pytest.mark.parametrize("command", [["evaluate"], ["chat", "--once", "x"], ["verify"]], ids=lambda command: command[0])
def test_a_folder_that_is_no_run_is_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, str(tmp_path / "none"), "--json"]) == 5
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["error"]["code"] == "run_folder"


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(spec: Path, tmp_path: Path) -> None:
    long = ("--set", "schedule.epochs=200", "--set", "evaluation.every_steps=100000")
    command = [
        sys.executable,
        "-c",
        "from kivnun.cli.main import main; main()",
        "tune",
        str(spec),
        "--output",
        "run",
        *long,
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        before: list[str] = []
        for line in process.stderr:
            before.append(line)
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(before) + err
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted"
    assert "go on with: kivnun tune" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert any((tmp_path / "run" / "checkpoints").iterdir())
