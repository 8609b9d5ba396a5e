"""Reading a spec: what is accepted, what is refused, and that every refusal says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kivnun.errors import SpecError
from kivnun.spec import DoraSpec, FullSpec, LoraSpec, MuonSpec, TuneSpec, load_spec, parse_spec
from kivnun.spec.evaluation import METRICS
from kivnun.spec.yaml_text import YamlError, read_scalar, read_yaml, write_scalar, write_yaml

SHORTEST = """\
version: 1
base: kivnun/tiny-phi
data: {train: train.jsonl, validation: 0.2}
adapter: {kind: lora, rank: 8}
schedule: {epochs: 2, batch_rows: 8, learning_rate: 1e-3}   # 1e-3 is a number here, whatever YAML 1.1 says
seed: 7
"""
HEAD = "version: 1\nbase: kivnun/tiny-phi\n"
MINIMAL = HEAD + "data: {train: a.jsonl}\n"


def spec_of(text: str, *overrides: str, folder: Path = Path("/specs")) -> TuneSpec:
    return parse_spec(text, folder=folder, source="spec.yaml", overrides=overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        spec_of(text, *overrides)
    said = str(caught.value)
    for leak in ("Input should", "validation error", "pydantic", "For further information", "_type", "Value error"):
        assert leak not in said
    return said


KINDS = "full or lora or dora or adalora or loha or lokr or vera or ia3 or ln_tuning or prompt or prefix"


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_training_every_weight_of_a_base_held_in_codes_is_refused(precision: str) -> None:
    said = refusal(SHORTEST, "adapter={kind: full}", f"base.precision={precision}")
    assert f"adapter is full, but weights held in {precision} cannot be trained" in said
    assert spec_of(SHORTEST, f"base.precision={precision}").base.precision == precision


def test_the_shortest_spec_works_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SHORTEST, encoding="utf-8")
    spec = load_spec(path)
    assert spec.base.model == "kivnun/tiny-phi"
    assert [source.path for source in spec.data.train] == [tmp_path / "train.jsonl"]
    assert spec.data.validation == 0.2
    assert isinstance(spec.adapter, LoraSpec)
    assert (spec.adapter.rank, spec.schedule.epochs, spec.schedule.batch_rows, spec.seed) == (8, 2, 8, 7)
    assert spec.schedule.learning_rate == 1e-3


def test_the_same_spec_in_json_is_equal() -> None:
    text = json.dumps(yaml.safe_load(SHORTEST.replace("1e-3 ", "0.001 ").replace("1e-3}", "0.001}")), indent="\t")
    assert spec_of(text) == spec_of(SHORTEST)
    assert parse_spec(text, folder=Path("/specs"), source="spec.json") == spec_of(SHORTEST)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SHORTEST.replace("\n", "\r\n").encode())
    assert load_spec(path) == spec_of(SHORTEST, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("+1.5e+2", 150.0), ("0o17", 15), ("0x1F", 31), ("-3", -3),
        ("010", 10),
        ("true", True), ("False", False), ("~", None), ("", None), ("NULL", None), ("yes", "yes"), ("off", "off"), ("on", "on"),
        ("no", "no"), ("1_000", "1_000"), ("1:30", "1:30"), ("2026-01-02", "2026-01-02"), (".inf", float("inf")), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = read_scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", '"true"', "1"])
def test_only_true_and_false_are_booleans(word: str) -> None:
    got = word if word == "1" else '"' + word.strip('"') + '"'
    said = refusal(MINIMAL + f"checkpoints: {{every_epoch: {word}}}")
    assert f"checkpoints.every_epoch must be true or false, got {got}" in said


def test_a_folder_called_no_keeps_its_name() -> None:
    assert spec_of(HEAD + "data: {train: no}").data.train[0].path == Path("/specs/no")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("adapter: {rank: true}", "adapter.rank must be a whole number from 1 to 1024, got true"),
        ("adapter: {rank: 0}", "adapter.rank must be a whole number from 1 to 1024, got 0"),
        ("adapter: {rank: 1025}", "from 1 to 1024, got 1025"),
        ("adapter: {rank: 8.0}", "a whole number from 1 to 1024, got 8.0"),
        ('adapter: {rank: "8"}', 'got "8"\n  hint: write the number without quotes'),
        ("adapter: {dropout: 1}", "adapter.dropout must be a number of at least 0 and below 1, got 1"),
        ("adapter: {dropout: true}", "adapter.dropout must be a number of at least 0 and below 1, got true"),
        ("adapter: {alpha: 0}", "adapter.alpha must be a number above 0, or null, got 0"),
        ("adapter: {target_modules: q_proj}", "hint: write [q_proj] for one name"),
        ("adapter: {target_modules: []}", "adapter.target_modules must be all-linear, or a list of module names, got []"),
        ("adapter: {target_modules: [a, a]}", "hint: each name once"),
        ("adapter: {kind: loar}", f"adapter must be a mapping with kind: {KINDS}, got {{kind: loar}}"),
        ("adapter: lora", f"adapter must be a mapping with kind: {KINDS}, got"),
        ("adapter: null", f"adapter must be a mapping with kind: {KINDS}, got null"),
        ("adapter: {init: pissa, dropout: 0.1}", "adapter.init is pissa, whose start is taken off again and must not be dropped"),
        ("adapter: {loraplus_lr_ratio: 0.5}", "adapter.loraplus_lr_ratio must be a number from 1 to 1024, got 0.5"),
        (
            "adapter: {kind: adalora, rank: 8, target_rank: 8}",
            "adapter.target_rank is 8, but must be below adapter.rank, which is 8",
        ),
        ("adapter: {kind: adalora, initial_share: 0.5, final_share: 0.5}", "leaves no step to give ranks up in"),
        (
            "adapter: {kind: prefix, num_virtual_tokens: 0}",
            "adapter.num_virtual_tokens must be a whole number from 1 to 1024, got 0",
        ),
        ("adapter: {kind: ia3, rank: 4}", "adapter.rank is no option of adapter with kind ia3"),
        ("adapter: {kind: full, rank: 8}", "adapter.rank is no option of adapter with kind full"),
        ("objective: {beta: 0.2}", "objective must be a mapping with kind: supervised or pretraining or dpo, or null"),
        ("objective: {kind: dpo, beta: 0}", "objective.beta must be a number above 0, got 0"),
        ("schedule: {learning_rate: 0}", "schedule.learning_rate must be a number above 0, or null, got 0"),
        ("schedule: {learning_rate: .inf}", "schedule.learning_rate must be a number above 0, or null, got inf"),
        ("schedule: {learning_rate: .nan}", "got nan"),
        ("schedule: {learning_rate: 1e400}", "got inf"),
        ("schedule: {epochs: 1, steps: 2}", "schedule.steps cannot be given together with schedule.epochs"),
        ("schedule: {batch_tokens: 9, batch_rows: 2}", "schedule.batch_tokens cannot be given together with schedule.batch_rows"),
        ("schedule: {decay: constant, final_share: 0.1}", "schedule.final_share has no effect when schedule.decay is constant"),
        ("schedule: {warmup_share: 0.2, decay_start_share: 0.1}", "schedule.decay_start_share is 0.1, inside the warm-up (0.2)"),
        ("schedule: {decay: liner}", "hint: did you mean linear?"),
        (
            "evaluation: {metrics: [chrf, bleu]}",
            f'evaluation.metrics.1 must be one of {", ".join(METRICS)}, got "bleu"',
        ),
        ("evaluation: {metrics: [chrf, chrf]}", "evaluation.metrics names a metric more than once"),
        ("evaluation: {samples: 3, generate_rows: 2}", "evaluation.samples is 3, more than evaluation.generate_rows (2)"),
        ("seed: -1", "seed must be a whole number of at least 0 and below 2^63, got -1"),
        ("seed: 9223372036854775808", "below 2^63"),
        ("seed: null", "seed must be a whole number"),
        ("compute: {device: gpu}", "compute.device must be one of auto, cpu, cuda"),
        ("checkpoints: []", "checkpoints must be a mapping with the keys every_steps, every_epoch, every_seconds, keep, got []"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_in_words(line: str, said: str) -> None:
    message = refusal(MINIMAL + line)
    assert said in message
    assert message.startswith("spec.yaml:4: ")


def test_a_rate_of_its_own_for_b_is_refused_under_muon() -> None:
    with pytest.raises(SpecError, match=r"schedule has the optimizer muon, which takes no rates of their own"):
        parse_spec(MINIMAL + "adapter: {loraplus_lr_ratio: 4}\nschedule: {optimizer: {kind: muon}}\n", folder=Path("/specs"))


@pytest.mark.parametrize(
    ("adapter", "stage", "allowed"),
    [
        ("{kind: dora}", 3, True), ("{init: eva}", 2, True), ("{kind: vera}", 0, True), ("{kind: vera}", 1, False),
        ("{init: pissa}", 2, False), ("{loraplus_lr_ratio: 2}", 3, False),
    ],
)  # fmt: skip
def test_state_is_divided_for_full_lora_and_dora_alone(adapter: str, stage: int, allowed: bool) -> None:
    text = MINIMAL + f"adapter: {adapter}\ncompute: {{kind: multi_process, zero_stage: {stage}}}\n"
    if allowed:
        parse_spec(text, folder=Path("/specs"))
        return
    with pytest.raises(SpecError, match=r"compute divides its state \(zero_stage above 0\)"):
        parse_spec(text, folder=Path("/specs"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{}", "data.train is missing: a path, or a list of paths and mappings {path, share}"),
        ("{train: []}", "name at least one file"),
        ("{train: ''}", "an empty path names no file"),
        ("{train: 3}", "data.train.0 must be a path or a mapping {path, share}, got 3"),
        ("{train: [a, {path: b, share: 1}]}", "data.train has shares for some files but not for a"),
        ("{train: [{path: b, share: 1}]}", "data.train has a share for its only file"),
        ("{train: [a, ./a]}", "more than once"),
        ("{train: a, validation: 1}", "data.validation must be a number between 0 and 1 (both excluded), a path, or null, got 1"),
        ("{train: a, validation: true}", "got true"),
        ('{train: a, validation: "0.1"}', "a share is written without quotes"),
        ("{train: a, validation: ./a}", "data.validation is one of the training files"),
        ("{train: a, max_seq_len: 1}", "data.max_seq_len must be a whole number of at least 2, or null, got 1"),
        ("{train: a, validation: ~/x, tmeplate: x}", "did you mean data.template?"),
    ],
)
def test_data_that_makes_no_sense_is_refused(data: str, said: str) -> None:
    assert said in refusal(HEAD + f"data: {data}")


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (
            "objective: {kind: dpo}\ndata: {train: a, format: messages}",
            "is dpo, but rows in the format messages are for supervised",
        ),
        ("evaluation: {metrics: [chrf]}\ndata: {train: a, validation: null}", "has metrics, but data.validation is null"),
        ("evaluation: {metrics: [chrf]}\ndata: {train: a}\nobjective: {kind: pretraining}", "pretraining has no replies"),
    ],
)
def test_rules_between_sections_hold(rest: str, said: str) -> None:
    assert said in refusal(HEAD + rest)


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("lr: 1", "schedule.learning_rate"),
        ("rank: 8", "adapter.rank"),
        ("learning_rate: 1", "schedule.learning_rate"),
        ("schedul: {}", "schedule"),
        ("schedule: {learning_rat: 1}", "schedule.learning_rate"),
        ("schedule: {num_train_epochs: 1}", "schedule.epochs"),
        ("schedule: {seed: 1}", "seed"),
        ("schedule: {optimizer: {kind: muon, momentm: 1}}", "schedule.optimizer.momentum"),
        ("adapter: {lora_alpha: 1}", "adapter.alpha"),
        ("adapter: {kind: dora, drop-out: 1}", "adapter.dropout"),
        ("checkpoints: {every_epochs: true}", "checkpoints.every_epoch"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_option_and_the_allowed_ones(line: str, near: str) -> None:
    said = refusal(MINIMAL + line)
    assert "is not an option" in said
    assert f"did you mean {near}? " in said
    assert " allows " in said


def test_an_option_of_another_kind_is_told_as_that() -> None:
    said = refusal(MINIMAL + "schedule: {optimizer: {kind: adamw, momentum: 0.9}}")
    assert "schedule.optimizer.momentum is no option of schedule.optimizer with kind adamw" in said
    assert "hint: remove momentum, or choose kind muon; adamw allows kind, beta1, beta2, eps, weight_decay" in said


def test_all_problems_are_told_together_with_their_lines() -> None:
    said = refusal("base: kivnun/tiny-phi\ndata:\n  train: a\n  bad_rows: maybe\nadapter:\n  rnk: 8\n  rank: 0\nseed: x\nsedd: 1\n")
    assert said.startswith("spec.yaml: 6 problems\n")
    assert "  version is missing: 1\n    hint: add version: to the spec\n" in said
    for line in ("line 4: data.bad_rows", "line 6: adapter.rnk", "line 7: adapter.rank", "line 8: seed", "line 9: sedd"):
        assert f"  {line}" in said


def test_a_version_that_is_not_known_is_refused() -> None:
    assert "version must be 1, got 2" in refusal(MINIMAL.replace("version: 1", "version: 2"))
    assert "version must be 1, got true" in refusal(MINIMAL.replace("version: 1", "version: true"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "spec.yaml must hold a mapping, got nothing"),
        ("# only a comment\n", "got nothing"),
        ("- a\n- b\n", "must hold a mapping, got [a, b]"),
        ("just text\n", 'must hold a mapping, got "just text"'),
        (MINIMAL + "seed: 1\nseed: 2\n", "spec.yaml:5: the key seed is given twice, first on line 4"),
        (HEAD + "data: {train: a, train: b}\n", "the key data.train is given twice"),
        ('{"version": 1, "base": "x/y", "base": "x/z"}', "the key base is given twice"),
        ("a: [1, 2\nb: 3\n", "spec.yaml:"),
        ("a: &x 1\nb: *x\n", "anchors (&) and aliases (*) are not used in specs"),
        ("a: !!python/object:os.system 1\n", "tags such as"),
        ("a: !!float 1\n", "tags such as"),
        ("a: 1\n---\nb: 2\n", "spec.yaml:2: more than one document"),
        ("? [a, b]\n: 1\n", "a key must be a plain word"),
        ("\ta: 1\n", "not YAML"),
        ("a: \x07\n", "which YAML does not allow"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper than 32 levels"),
        ("{" + '"a": {' * 5000 + "}" * 5001, "nested"),
        ("seed: " + "9" * 5000, "a number of 5000 digits is too long"),
        ('base: "a\\0b"\n', "text with a NUL character"),
        ('base: "\\ud800"\n', "text with half of a surrogate pair"),
        ('{"base": "\\ud800"}', "text with half of a surrogate pair"),
        ('{"version": NaN}', "NaN is not a number that JSON has"),
        (MINIMAL + "<<: {seed: 1}", "<< is not an option"),
        (MINIMAL + "1: 2", "1 is not an option"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(text: str, said: str) -> None:
    assert said in refusal(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"base: caf\xe9\n")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    cases = {
        tmp_path: "is a folder",
        tmp_path / "none.yaml": "does not exist",
        latin: "is not UTF-8 (byte 9)",
        large: "is larger than 1 MiB",
        Path("a\0b"): "is not a path",
        latin / "x.yaml": "cannot be read: Not a directory",
    }
    for path, said in cases.items():
        with pytest.raises(SpecError, match="hint: ") as caught:
            load_spec(path)
        assert said in str(caught.value)


def test_relative_paths_start_from_the_folder_of_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "models" / "phi").mkdir(parents=True)
    path = tmp_path / "specs" / "spec.yaml"
    path.write_text(
        "version: 1\nbase: ../models/phi\n"
        "data: {train: [a.jsonl, sub/b.jsonl], validation: ../held.jsonl, template: /t/chat.jinja}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    for spec in (load_spec(path), load_spec(Path("specs/spec.yaml"))):
        assert spec.base.model == str(tmp_path / "models" / "phi")
        assert [source.path for source in spec.data.train] == [
            tmp_path / "specs" / "a.jsonl",
            tmp_path / "specs" / "sub" / "b.jsonl",
        ]
        assert spec.data.validation == tmp_path / "held.jsonl"
        assert spec.data.template == Path("/t/chat.jinja")


def test_a_tilde_stands_for_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spec_of("version: 1\nbase: ~/phi\ndata: {train: ~/a.jsonl}").base.model == str(tmp_path / "phi")


def test_a_base_is_a_built_in_id_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "plain").mkdir()

    def model(text: str) -> str:
        return spec_of(f"version: 1\nbase: {text}\ndata: {{train: a}}", folder=tmp_path).base.model

    assert model("kivnun/tiny-phi") == "kivnun/tiny-phi"
    assert model("org/name") == str(tmp_path / "org" / "name")
    assert model("plain") == str(tmp_path / "plain")
    assert model("microsoft/Phi-4-mini-instruct") == "microsoft/Phi-4-mini-instruct"
    assert model("{model: microsoft/phi-4, revision: main}") == "microsoft/phi-4"
    assert model("./not-there") == str(tmp_path / "not-there")
    assert "a hub id has the form org/name" in refusal("version: 1\nbase: nowhere\ndata: {train: a}")
    for base in ("kivnun/tiny-phi", "/a/folder"):
        assert "base.revision has no meaning" in refusal(f"version: 1\nbase: {{model: {base}, revision: main}}\ndata: {{train: a}}")


def test_a_kind_with_a_default_may_be_left_out() -> None:
    spec = spec_of(MINIMAL + "adapter: {rank: 4}\nschedule: {optimizer: {beta1: 0.8}}\ncompute: {threads: 2}")
    assert isinstance(spec.adapter, LoraSpec)
    assert (spec.adapter.rank, spec.schedule.optimizer.beta1, spec.compute.threads) == (4, 0.8, 2)


def test_whole_numbers_are_numbers_where_numbers_are_asked_for() -> None:
    given_as = [spec_of(MINIMAL + f"adapter: {{alpha: {text}}}") for text in ("16", "16.0", "1.6e1")]
    assert given_as[0] == given_as[1] == given_as[2]
    assert len({spec.content_hash() for spec in given_as}) == 1


def test_overrides_are_laid_over_the_file() -> None:
    spec = spec_of(
        SHORTEST,
        "schedule.learning_rate=3E-4", "schedule.epochs=null", "schedule.steps=50", "evaluation.metrics=[chrf, exact_match]",
        "data.validation=held.jsonl", "base.precision=bf16", "checkpoints.every_epoch=false", "schedule.optimizer={kind: muon}",
        "schedule.optimizer.momentum=0.9", "seed = 9",
    )  # fmt: skip
    assert (spec.schedule.learning_rate, spec.schedule.epochs, spec.schedule.steps) == (3e-4, None, 50)
    assert spec.evaluation.metrics == ("chrf", "exact_match")
    assert spec.data.validation == Path("/specs/held.jsonl")
    assert (spec.base.model, spec.base.precision) == ("kivnun/tiny-phi", "bf16")
    assert spec.checkpoints.every_epoch is False
    assert spec.schedule.optimizer == MuonSpec(momentum=0.9)
    assert spec.seed == 9
    assert spec.schedule.batch_rows == 8


def test_the_last_of_two_overrides_wins() -> None:
    assert spec_of(SHORTEST, "seed=1", "seed=2").seed == 2


def test_overrides_reach_into_lists_of_files() -> None:
    spec = spec_of(HEAD + "data: {train: [a, {path: b}]}", "data.train.0.share=3", "data.train.1.share=1")
    assert [(source.path.name, source.share) for source in spec.data.train] == [("a", 3.0), ("b", 1.0)]
    assert spec_of(MINIMAL, "data.train.0.path=z").data.train[0].path == Path("/specs/z")
    assert "counted from 0" in refusal(MINIMAL, "data.train.1=b")
    assert "counted from 0" in refusal(HEAD + "data: {train: [a]}", "data.train.4.share=1")


def test_switching_the_kind_keeps_what_both_have_and_names_what_is_left_over() -> None:
    dora = spec_of(SHORTEST, "adapter.kind=dora").adapter
    assert isinstance(dora, DoraSpec)
    assert dora.rank == 8
    assert spec_of(SHORTEST, "adapter={kind: full}").adapter == FullSpec()
    said = refusal(MINIMAL + "adapter: {rank: 8, dropout: 0.1}", "adapter.kind=full")
    assert "adapter.rank is no option of adapter with kind full" in said
    assert "adapter.dropout is no option of adapter with kind full" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "schedule.learning_rat=1",
            "--set schedule.learning_rat: there is no such option\n  hint: did you mean schedule.learning_rate?",
        ),
        ("lr=1", "did you mean schedule.learning_rate?"),
        ("adapter.r=1", "did you mean adapter.rank?"),
        ("schedule", "has no value\n  hint: write --set path=value"),
        ("=1", "has no value"),
        ("seed.x=1", "seed has no parts"),
        ("seed=[1", "--set seed: not YAML"),
        ("seed=-1", "seed must be a whole number of at least 0"),
        ("adapter.momentum=1", "did you mean schedule.optimizer.momentum?"),
        ("data.train.x=1", "there is no such option"),
        ("0=1", "there is no such option"),
    ],
)
def test_an_override_that_fits_nothing_is_refused(override: str, said: str) -> None:
    assert said in refusal(MINIMAL, override)


def test_a_part_of_a_value_without_parts_cannot_be_set() -> None:
    assert "adapter is 3, which has no parts" in refusal(MINIMAL + "adapter: 3", "adapter.rank=8")


def test_all_wrong_overrides_are_told_with_the_problems_of_the_file() -> None:
    said = refusal(MINIMAL + "seed: x", "lr=1", "adapter.rnk=2")
    assert "3 problems" in said


def test_lines_are_told_for_what_the_file_says_and_not_for_what_an_override_says() -> None:
    said = refusal(MINIMAL + "seed: x\nadapter: {rank: 0}\n", "adapter.dropout=2", "schedule.epochs=0")
    assert "\n  line 4: seed must be" in said
    assert "\n  line 5: adapter.rank must be" in said
    assert "\n  adapter.dropout must be" in said
    assert "\n  schedule.epochs must be" in said


def test_a_spec_cannot_be_changed() -> None:
    spec = spec_of(SHORTEST)
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 3  # type: ignore[misc]
    assert hash(spec) == hash(spec_of(SHORTEST))


@given(st.text())
def test_any_text_is_written_so_that_it_reads_back(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in text):
        return
    assert read_yaml(f"a: {write_scalar(text)}\nb: [{write_scalar(text)}]\n").value == {"a": text, "b": [text]}


@given(st.floats(allow_nan=False) | st.integers(-(10**20), 10**20) | st.booleans() | st.none())
def test_any_number_is_written_so_that_it_reads_back(value: object) -> None:
    if value in (float("inf"), float("-inf")):
        return
    found = read_yaml(f"a: {write_scalar(value)}").value
    assert found == {"a": value}
    assert isinstance(found, dict)
    assert type(found["a"]) is type(value)


@given(st.text(alphabet="ab:{}[]-#&*!|>'\"%@`,?\\ \n\t\r\0\ufeff\x85é~.0e", max_size=40))
def test_no_text_makes_the_reader_fail_otherwise_than_by_its_own_error(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text, folder=Path("/specs"))


def test_comments_of_written_yaml_are_not_read() -> None:
    text = write_yaml({"a": {"b": 1}, "c": [1, "x y"]}, {"a.b": "because\nof # this: {", "c": "why"})
    assert text == 'a:\n  b: 1  # because of # this: {\nc: [1, "x y"]  # why\n'
    assert read_yaml(text).value == {"a": {"b": 1}, "c": [1, "x y"]}


def test_a_problem_in_a_scalar_names_its_line() -> None:
    with pytest.raises(YamlError) as caught:
        read_yaml("a: 1\nb: " + "1" * 500)
    assert caught.value.line == 2


def test_reading_a_spec_imports_no_model_library() -> None:
    code = "import sys, kivnun.spec; print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert shown.stdout.strip() == "[]"
