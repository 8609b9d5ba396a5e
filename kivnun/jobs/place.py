"""Where a service is: its database, its blobs, its configuration and the folder of one machine's processes. Every process of the
service is told the same four things and opens them for itself.

Next: `database.py`, `blobs.py`, `config.py`.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kivnun.artifacts import storage_errors
from kivnun.errors import SpecError
from kivnun.jobs.blobs import BlobStore, FolderBlobs
from kivnun.jobs.config import ServiceConfig, read_config
from kivnun.jobs.database import Database, sqlite_url
from kivnun.jobs.effects import Watch, unwatched

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """`data` is a folder of this machine alone: scratch, sockets, and, where no URL is given, the database and the blobs."""

    data: Path
    db_url: str
    store_url: str
    config: Path | None = None

    def keep_private(self) -> None:
        """Make the folder, and close it to other users; whatever this process and its children make from now on is closed too.

        One that is shared on purpose (as /tmp is), or that another user owns, stays as it is."""
        os.umask(0o077)
        with storage_errors(self.data):
            self.data.mkdir(parents=True, exist_ok=True)
            found = self.data.stat()
        if not found.st_mode & 0o077:
            return
        if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:
            with storage_errors(self.data):
                self.data.chmod(0o700)
        else:
            logger.warning("others can look into the data folder: give the service one of its own", extra={"action": "data_open"})

    def database(self, watch: Watch = unwatched) -> Database:
        return Database(self.db_url, watch)

    def blobs(self, watch: Watch = unwatched) -> BlobStore:
        """Return the store. Raises SpecError for a URL of another kind."""
        if self.store_url.startswith("s3://"):
            from kivnun.jobs.s3 import S3Blobs  # obstore is loaded by those who use it

            return S3Blobs(self.store_url, watch)
        if self.store_url.startswith("file://"):
            return FolderBlobs(Path(self.store_url.removeprefix("file://")), watch)
        raise SpecError(
            f"--store {self.store_url} is neither file:// nor s3://", hint="file:///srv/kivnun/blobs or s3://BUCKET/PREFIX"
        )

    def service_config(self) -> ServiceConfig:
        return read_config(self.config)


def place_in(data: Path, db_url: str | None = None, store_url: str | None = None, config: Path | None = None) -> Place:
    """Return the place of a service that keeps in `data` whatever is not said to be elsewhere."""
    data = data.absolute()
    return Place(data, db_url or sqlite_url(data / "kivnun.sqlite"), store_url or f"file://{data / 'blobs'}", config)
