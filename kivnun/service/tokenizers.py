"""The bases' tokenizers, with which requests are read and answers spelt: each read once, and fetched where it is not here.

Only a base's small files are fetched: the weights are the workers' affair. Whoever waits for one base delays nobody who asks for
another, and holds no thread that requests run in. Next: `answering.py`, `kivnun/model/hub.py`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from kivnun.errors import BaseModelError, KivnunError
from kivnun.jobs.config import ServiceConfig
from kivnun.model.families import find_texts, longest_row, read_config, refuse_family
from kivnun.model.hub import may_come_later
from kivnun.serve.base_tokens import BaseTokens
from kivnun.serve.question import Asked
from kivnun.serve.toy import LONGEST, ToyTokens
from kivnun.service.errors import ApiError

AT_ONCE = 8  # bases being read

logger = logging.getLogger(__name__)


class Tokenizers:
    """The tokenizers of the configured bases. Threads and event loops may share it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._lock = threading.Lock()  # of the two below; nothing is read while it is held
        self._readings: dict[str, Future[Asked]] = {}
        self._readers = ThreadPoolExecutor(AT_ONCE, "tokenizers")

    def is_here(self, base: str) -> bool:
        """Return whether a base's tokenizer was read."""
        with self._lock:
            return base in self._readings and _is_good(self._readings[base])

    async def of(self, base: str) -> Asked:
        """Return a base's tokenizer and longest row. Raises ApiError; the next to ask tries again."""
        with self._lock:
            reading = self._readings.get(base)
            if reading is None or (reading.done() and not _is_good(reading)):
                reading = self._readings[base] = self._readers.submit(self._read, base)
        try:
            return await asyncio.shield(asyncio.wrap_future(reading))  # who leaves ends it for nobody else
        except KivnunError as error:
            if isinstance(error, BaseModelError) and may_come_later(error):
                message = f"the tokenizer of {base} is not here yet, and the hub that has it cannot be reached: try again"
                raise ApiError(503, message, code="overloaded", type="server_error") from None
            message = f"{base} cannot be asked here: its tokenizer cannot be had; the server's log says why, its operator can help"
            raise ApiError(400, message, code="model_not_available", param="model") from None

    def _read(self, base: str) -> Asked:
        entry = self._config.bases[base]
        if entry.trainer == "toy":
            return Asked(base, ToyTokens(), LONGEST, constrains=False)
        try:
            folder = find_texts(self._config.model_of(base), entry.revision)
            refuse_family(base, read_config(folder))
            return Asked(base, BaseTokens(folder), longest_row(folder))
        except KivnunError as error:
            logger.error("a base's tokenizer cannot be had", exc_info=error, extra={"action": "tokenizer_missing", "base": base})
            raise


def _is_good(reading: Future[Asked]) -> bool:
    return reading.done() and not reading.cancelled() and reading.exception() is None
