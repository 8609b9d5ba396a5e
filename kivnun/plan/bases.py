"""A base's sizes by what a spec calls it: a folder, the built-in base, a Phi model by its hub id, or any hub id (its configuration
alone is downloaded). Next: `sizes.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.errors import BaseModelError
from kivnun.model.families import BUILT_IN, find_base, read_config, refuse_family
from kivnun.model.hub import configuration
from kivnun.model.phi import PHI, USE_INSTEAD, phi_by_id
from kivnun.plan.sizes import Sizes


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base by its name in a spec. `folder` is where its tokenizer is, None where that is not on this machine."""

    name: str
    sizes: Sizes
    folder: Path | None


def known_base(name: str) -> KnownBase:
    """Return what is known of a base without its weights. Raises BaseModelError."""
    name, config, folder = known_config(name)
    has_tokenizer = folder is not None and (folder / "tokenizer.json").is_file()
    return KnownBase(name, Sizes.of(config, name), folder if has_tokenizer else None)


def known_config(name: str) -> tuple[str, Mapping[str, Any], Path | None]:
    """Return a base's name as the hub spells it, its configuration, and its folder where it has one on this machine.

    Raises BaseModelError for a base that is refused whatever its weights are, or that cannot be had.
    """
    if name in BUILT_IN or Path(name).is_dir():
        folder = find_base(name)
        config = read_config(folder)
        refuse_family(name, config)
        return name, config, folder
    phi = phi_by_id(name)
    if phi is not None:
        if phi.refused is not None:
            raise BaseModelError(f"{phi.id}: {phi.refused}", hint=USE_INSTEAD)
        return phi.id, phi.config, None
    if name.count("/") != 1 or name.startswith((".", "/", "~", "kivnun/")):
        known = f"a folder, {', '.join(BUILT_IN)}, or a hub id such as {next(iter(PHI))}"
        raise BaseModelError(f"base {name!r} is neither a folder nor a model id", hint=f"give {known}")
    config = configuration(name)
    refuse_family(name, config)
    return name, config, None
