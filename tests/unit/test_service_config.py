"""The operator's configuration: what is wrong with a file is said by its key, with what is allowed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from kivnun.errors import SpecError
from kivnun.jobs.config import read_config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "bases: {acme/tiny: {presicion: fp32}}",
            "bases.acme/tiny.presicion is not an option, did you mean precision? (all",
        ),
        ("bases: {acme/tiny: {price: {trainig: 1}}}", "bases.acme/tiny.price.trainig is not an option, did you mean training?"),
        ("limits: {request_per_minute: 5}", "limits.request_per_minute is not an option, did you mean requests_per_minute?"),
        ("organisation: acme", "organisation is not an option, did you mean organization?"),
        ("colour: red", "colour is not an option (allowed are version, organization"),
        ("limits: {active_jobs: many}", "limits.active_jobs: Input should be a valid integer, got 'many'"),
        ("aliases: {gpt: nothing}", "aliases.gpt names 'nothing', which is not among bases"),
        ("- bases", "must hold a mapping, got list"),
        ("bases: {", "is no YAML in UTF-8"),
    ],
)
def test_what_is_wrong_is_said_by_its_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(f"version: 1\n{text}\n" if not text.startswith("-") else text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        read_config(path)
    assert said in caught.value.message
    assert "service-operate.md" in (caught.value.hint or "")


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("colour: red\nlimits: {files: 0}\n", encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        read_config(path)
    assert "colour is not an option" in caught.value.message
    assert "limits.files: Input should be greater than or equal to 1, got '0'" in caught.value.message
