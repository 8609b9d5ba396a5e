"""The Phi models by name: what the table says is what transformers builds of it, and what the command and the guide tell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kivnun.cli.main import run
from kivnun.errors import BaseModelError
from kivnun.model.coverage import cover
from kivnun.model.families import FUSED_PARTS, base_hash, find_base
from kivnun.model.phi import PHI, REFUSED, nearest_id, phi_by_id, refusal_of
from kivnun.plan.bases import base_files, known_base
from kivnun.plan.sizes import FAMILIES, Sizes

TUNED = [model for model in PHI.values() if model.refused is None]
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "your-base.md"
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
SPLIT = {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}


@pytest.mark.parametrize("name", ["microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-4-mini-instruct", "microsoft/phi-1_5"])
def test_what_is_told_of_a_model_is_what_transformers_builds(name: str) -> None:
    model = PHI[name]
    found = cover(name, model.config)
    assert found.parameters == model.parameters
    assert {target.name for target in found.targets} == (FUSED if model.config["model_type"] == "phi3" else SPLIT)
    assert all(target.count == model.config["num_hidden_layers"] for target in found.targets)
    assert all(set(target.parts) == FUSED_PARTS.get(target.name, set()) for target in found.targets)
    assert found.fast == (model.config["model_type"] == "phi3")
    assert found.tied == model.config["tie_word_embeddings"]
    assert (found.rope.kind, found.rope.share, found.rope.original) == (model.rope.kind, model.rope.share, model.rope.original)
    assert found.window == ("2,047 tokens" if "3-mini-4k" in name else "none within its context")
    assert found.uncovered == {}
    assert found.distance < 1e-4


@pytest.mark.parametrize("model", TUNED, ids=lambda model: model.id)
def test_every_model_has_the_parameters_of_its_configuration(model) -> None:
    config = model.config
    if config["model_type"] in FAMILIES:
        assert Sizes.of(config, model.id).numbers == model.parameters
    else:  # two norms of width and bias, four square layers and two of the MLP, each with a bias; a head with a bias
        width, inner = config["hidden_size"], config["intermediate_size"]
        layer = 4 * (width * width + width) + 2 * width * inner + width + inner + 2 * width
        assert config["num_hidden_layers"] * layer + (2 * width + 1) * config["vocab_size"] + 2 * width == model.parameters


@pytest.mark.parametrize("model", TUNED, ids=lambda model: model.id)
def test_markers_are_those_of_the_turn_and_lengths_fit(model) -> None:
    assert bool(model.markers) == (model.config["model_type"] == "phi3")
    assert set(model.markers) == set(re.findall(r"<\|\w+\|>", model.turn or ""))
    context = model.config["max_position_embeddings"]
    assert (model.rope.kind == "LongRoPE") == (context == 131072)
    assert model.rope.original == (4096 if model.rope.kind == "LongRoPE" else None)
    assert model.licence == "MIT"


def test_a_model_is_found_however_it_is_capitalised_and_its_neighbour_by_a_slip() -> None:
    assert phi_by_id("MICROSOFT/PHI-4") is PHI["microsoft/phi-4"]
    assert nearest_id("microsoft/phi4") == "microsoft/phi-4"
    assert nearest_id("microsoft/Phi-3-mini-4k") == "microsoft/Phi-3-mini-4k-instruct"
    assert nearest_id("acme/other") is None
    assert {model.id for model in PHI.values() if refusal_of(model.id)} == {m.id for m in PHI.values() if m.refused}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_kind_is_refused_by_id_and_by_folder_and_in_every_command(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": {}}), encoding="utf-8")
    (name,) = [model.id for model in PHI.values() if model.config["model_type"] == kind][:1]
    for base in (name, str(tmp_path)):
        assert run(["bases", base]) == 4
        assert REFUSED[kind] in capsys.readouterr().err
        with pytest.raises(BaseModelError, match=re.escape(REFUSED[kind])):
            known_base(base)
    with pytest.raises(BaseModelError, match=re.escape(REFUSED[kind])):
        find_base(name)


def test_the_command_lists_every_model_and_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == ["kivnun/tiny-phi", *PHI]
    assert {row["id"] for row in rows if row["refused"]} == {model.id for model in PHI.values() if model.refused}
    assert run(["bases"]) == 0
    table = capsys.readouterr().out
    for model in PHI.values():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{model.id} ")]
        assert ("refused: " in line) == (model.refused is not None)


def test_one_base_is_told_with_all_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bases", "microsoft/phi-1_5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["fast"], facts["template"]) == ("Phi-1.5", False, None)
    linear, outer = facts["linear_numbers"], facts["parameters"] - facts["linear_numbers"]
    assert facts["weight_bytes"]["bf16"] == 2 * facts["parameters"]
    assert facts["weight_bytes"]["int8"] == linear + 2 * outer
    assert abs(facts["weight_bytes"]["nf4"] - (0.516 * linear + 2 * outer)) < 1e-3 * linear


def test_a_hash_that_is_told_of_a_folder_is_the_one_that_pins_it(capsys: pytest.CaptureFixture[str]) -> None:
    from kivnun.model.load import load_base

    assert run(["bases", "kivnun/tiny-phi", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["content_hash"]
    assert load_base(find_base("kivnun/tiny-phi"), "fp32", content_hash=told).content_hash == told


def test_the_hash_in_the_guide_is_the_built_in_bases() -> None:
    (written,) = re.findall(r"content_hash: (\w{64})", PAGE.read_text(encoding="utf-8"))
    assert written == base_hash(find_base("kivnun/tiny-phi"))


def test_the_guides_table_of_phi_is_the_codes() -> None:
    """Parameters, context, window, rotation and template of every model, as the page prints them."""
    page = PAGE.read_text(encoding="utf-8")
    for model in PHI.values():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{model.id}` ")]
        assert line == f"| {' | '.join(guide_cells(model))} |"


def guide_cells(model) -> list[str]:
    if model.refused is not None:
        return [f"`{model.id}`", "-", "-", "-", "-", f"refused: {model.refused}"]
    config, rope = model.config, model.rope
    window = config.get("sliding_window")
    shown = f"{window:,}" if window and window < config["max_position_embeddings"] else "none"
    turned = [rope.kind, *([f"{rope.share:.0%} of a head"] if rope.share != 1 else [])]
    context = f"{config['max_position_embeddings']:,}" + (f" ({rope.original:,})" if rope.original else "")
    marks = " ".join(f"`{mark}`" for mark in dict.fromkeys(model.markers)).replace("|", "\\|") or "none"
    return [f"`{model.id}`", f"{model.parameters / 1e9:.2f}", context, shown, ", ".join(turned), marks]


def test_a_name_that_is_nothing_is_told_what_there_is() -> None:
    with pytest.raises(BaseModelError, match="neither a folder nor a model id") as caught:
        base_files("phi-4")
    assert "microsoft/Phi-3-mini-4k-instruct" in str(caught.value)
