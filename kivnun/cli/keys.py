"""`kivnun keys`: the API keys of a tenant, over the service's API. Next: `remote.py`."""

from __future__ import annotations

import time
from typing import Any

import click

from kivnun.cli.remote import part, remote, remote_options

SCOPES = ("read", "data", "tune", "chat", "admin")


@click.group(short_help="Make, list and revoke API keys of a service.")
def keys() -> None:
    """Make, list and revoke API keys of a running service.

    The key that calls is in KIVNUN_API_KEY and needs the scope `admin`.
    """


@keys.command(short_help="Make a key; it is shown once.")
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="What it may do; several times. By default all but admin."
)
@click.option("--tenant", help="Whose key it is; by default the caller's tenant.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="After how many days it expires; by default never.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print the key's record with the key itself as one JSON object.")
def create(name: str, scopes: tuple[str, ...], tenant: str | None, days: float | None, url: str, as_json: bool) -> None:
    """Make a key with a NAME that tells it from others. It is shown this once: the service keeps its hash alone."""
    from kivnun.cli.screen import print_json, stdout

    body: dict[str, Any] = {"name": name, "scopes": list(scopes or SCOPES[:-1])}
    if tenant is not None:
        body["tenant"] = tenant
    if days is not None:
        body["expires_in_s"] = max(1, round(days * 86_400))
    made = remote(url).post("/x_keys", body)
    if as_json:
        print_json(made)
    else:
        stdout().print(f"{made['id']}, shown this once: {made['key']}")


@keys.command("list", short_help="List keys.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print {keys: [...]} as one JSON object.")
def list_keys(url: str, as_json: bool) -> None:
    """List the keys that the caller may see, revoked ones too. Of a key only the last four letters are known."""
    from kivnun.cli.screen import print_json, table

    found = remote(url).get("/x_keys")["data"]
    if as_json:
        print_json({"keys": found})
        return
    rows = [
        (key["id"], key["name"], key["tenant"], f"…{key['hint']}", ", ".join(key["scopes"]), when(key["created_at"]), _state(key))
        for key in found
    ]
    table(("id", "name", "tenant", "key", "scopes", "made", "state"), rows)


@keys.command(short_help="Revoke a key.")
@click.argument("key_id", metavar="ID")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print the key's record as one JSON object.")
def revoke(key_id: str, url: str, as_json: bool) -> None:
    """Revoke the key with this ID: the next request with it is refused. There is no way back."""
    from kivnun.cli.screen import print_json, stdout

    revoked = remote(url).delete(f"/x_keys/{part(key_id)}")
    if as_json:
        print_json(revoked)
    else:
        stdout().print(f"{key_id} is revoked")


@keys.command(short_help="Put a new key in a key's place.")
@click.argument("key_id", metavar="ID")
@click.option("--grace-hours", type=click.FloatRange(0, 168), default=0.0, help="Hours that the old one stays good.")
@remote_options
@click.option("--json", "as_json", is_flag=True, help="Print the new key's record with the key itself as one JSON object.")
def rotate(key_id: str, grace_hours: float, url: str, as_json: bool) -> None:
    """Put a new key, with the same scopes, in the place of the key with this ID. It is shown this once."""
    from kivnun.cli.screen import print_json, stdout

    made = remote(url).post(f"/x_keys/{part(key_id)}/rotate", {"grace_s": round(grace_hours * 3600)})
    if as_json:
        print_json(made)
    else:
        stdout().print(f"{made['id']}, shown this once: {made['key']}")


def when(seconds: float | None) -> str:
    """Return a time as people read it, in this machine's zone."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _state(key: dict[str, Any]) -> str:
    if key.get("revoked_at") is not None:
        return f"revoked {when(key['revoked_at'])}"
    if key.get("expires_at") is not None:
        gone = key["expires_at"] <= time.time()
        return f"{'expired' if gone else 'until'} {when(key['expires_at'])}"
    return "valid"
