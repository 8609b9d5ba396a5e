"""A grammar at work: which tokens may come next in an answer that is held to a form.

Next: `constraints.py` (where grammars come from), `kivnun/model/generate.py` (who obeys).
"""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from kivnun.errors import DataError
from kivnun.serve.constraints import parser_limits

HINT = "ask for a simpler form"


class GrammarForm:
    """One answer's place in a grammar. Raises DataError where the grammar allows no answer, or has become too costly."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @classmethod
    def of(cls, spelling: LLTokenizer, grammar: str) -> GrammarForm:
        """Return the beginning of an answer of a grammar: a costly one takes a second to read."""
        form = cls(LLMatcher(spelling, grammar, limits=parser_limits(), log_level=0))
        form._refuse_broken()
        if form._matcher.is_stopped():
            raise DataError("no answer is of this form", hint=HINT)
        return form

    def copy(self) -> GrammarForm:
        """Return another answer's place, where this one's is."""
        return GrammarForm(self._matcher.deep_copy())

    def allowed_V(self, size: int) -> np.ndarray:
        """Return which tokens may come next (bool [V]); where the answer may end, stop ids are among them."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._refuse_broken()
        allowed_V = np.zeros(size, dtype=bool)
        allowed_V[: min(size, len(bits))] = bits[:size].astype(bool)
        if not allowed_V.any():
            raise DataError("no token of this base goes on with an answer of this form", hint=HINT)
        return allowed_V

    def take(self, token: int) -> bool:
        """Hear which token came; return whether none may follow."""
        self._matcher.consume_token(token)
        self._refuse_broken()
        return self._matcher.is_stopped()

    def _refuse_broken(self) -> None:
        if self._matcher.is_error():
            raise DataError(f"the form cannot be kept to: {' '.join(self._matcher.get_error().split())[:200]}", hint=HINT)
