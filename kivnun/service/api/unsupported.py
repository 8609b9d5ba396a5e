"""What OpenAI's and Azure's services have and this one has not: each answered at once, with what is offered in its place.

A client that calls these by habit learns more from a sentence than from a 404. Next: `tuning.py`.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from kivnun.service.auth import Reader
from kivnun.service.errors import bad_request
from kivnun.service.tuning_request import METHODS

router = APIRouter(include_in_schema=False)

_CHAT = "POST /chat/completions and POST /completions answer prompts here"
_TUNING = f"POST /fine_tuning/jobs tunes here, by the methods {METHODS}"
OFFERED = {
    "fine_tuning/alpha/graders": f"graders are part of reinforcement tuning; {_TUNING}",
    "fine_tuning/checkpoints": "checkpoints are not shared: the keys of the tenant whose job made them can call them all",
    "evals": "held-out examples are scored in a job that has a validation_file; its events and results files hold the scores",
    # All but the POST that asks: chat.py has that, and its routes are looked at first.
    "chat/completions": "answers are not kept, with store: true neither; POST /chat/completions answers, and the client keeps it",
    "responses": _CHAT,
    "embeddings": _CHAT,
    "images": f"text alone is read and written; {_CHAT}",
    "audio": f"text alone is read and written; {_CHAT}",
    "moderations": _CHAT,
    "assistants": _CHAT,
    "threads": _CHAT,
    "vector_stores": _CHAT,
}
METHODS_OF_HTTP = ["GET", "POST", "DELETE", "PUT", "PATCH"]


def _refusing(what: str, offered: str) -> None:
    def refuse(request: Request, who: Reader) -> None:
        raise bad_request(f"/{what} is not offered: {offered}", code="unsupported_endpoint")

    for prefix in ("", "/deployments/{deployment}"):
        for path in (f"{prefix}/{what}", f"{prefix}/{what}/{{rest:path}}"):
            router.add_api_route(path, refuse, methods=METHODS_OF_HTTP)


for _what, _offered in OFFERED.items():
    _refusing(_what, _offered)
