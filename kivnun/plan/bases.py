"""A base's sizes by what a spec calls it: a folder, the built-in base, a Phi model by its hub id, or any hub id (its configuration
alone is downloaded). Next: `sizes.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivnun.errors import BaseModelError
from kivnun.model.families import BUILT_IN, find_base, read_config, refuse_family, refuse_other_weights
from kivnun.model.hub import NOT_FOUND, configuration
from kivnun.model.phi import PHI, REFUSED_FAMILY, USE_INSTEAD, phi_by_id, rope_of
from kivnun.plan.sizes import Sizes


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base by its name in a spec. `folder` is where its tokenizer is, None where that is not on this machine."""

    name: str
    sizes: Sizes
    folder: Path | None


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base's configuration by its name as the hub spells it, and the folder that holds its files (None: not on this machine)."""

    name: str
    config: Mapping[str, Any]
    folder: Path | None

    @property
    def turns_from(self) -> int | None:
        """Return the length above which a row takes LongRoPE's long factors; None where there is one set of factors."""
        return rope_of(self.config).original


def base_files(name: str, revision: str | None = None) -> BaseFiles:
    """Return a base's configuration, without its weights.

    Raises BaseModelError for a base that is refused whatever its weights are, or that has only weights that are never opened, or
    that cannot be had.
    """
    if name in BUILT_IN or Path(name).is_dir():
        folder = find_base(name)
        config = read_config(folder)
        refuse_family(name, config)
        refuse_other_weights(folder)
        return BaseFiles(name, config, folder)
    phi = phi_by_id(name)
    if phi is not None:
        if phi.refused is not None:
            raise BaseModelError(f"{phi.id}: {phi.refused}", hint=USE_INSTEAD, pages=(REFUSED_FAMILY,))
        return BaseFiles(phi.id, phi.config, _cached(phi.id, revision))
    if name.count("/") != 1 or name.startswith((".", "/", "~", "kivnun/")):
        known = f"a folder, {', '.join(BUILT_IN)}, or a hub id such as {next(iter(PHI))}"
        raise BaseModelError(f"base {name!r} is neither a folder nor a model id", hint=f"give {known}", pages=(NOT_FOUND,))
    folder = _cached(name, revision)
    config = configuration(name) if folder is None else read_config(folder)
    refuse_family(name, config)
    return BaseFiles(name, config, folder)


def known_base(name: str) -> KnownBase:
    """Return what is known of a base without its weights. Raises BaseModelError."""
    files = base_files(name)
    has_tokenizer = files.folder is not None and (files.folder / "tokenizer.json").is_file()
    return KnownBase(files.name, Sizes.of(files.config, files.name), files.folder if has_tokenizer else None)


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub's model that was downloaded before, with its tokenizer; None: it was not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file, revision=revision) for file in ("tokenizer.json", "config.json")]
    except HFValidationError:
        return None
    return Path(found[0]).parent if all(isinstance(file, str) for file in found) else None  # type: ignore[arg-type]
