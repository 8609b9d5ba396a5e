"""Keys, tuned models and deployments as rows, on both databases: each tenant finds its own, and a dump holds no key."""

from __future__ import annotations

import hmac
from dataclasses import replace

import pytest
import sqlalchemy as sa

from kivnun.jobs import deployments, models, running, tenants, tuning
from kivnun.jobs.database import Database
from kivnun.jobs.holdings import Holdings, holdings_of
from kivnun.jobs.ids import new_id
from kivnun.jobs.models import Model
from kivnun.jobs.schema import metadata
from service_parts import KEY, OTHER_KEY

JOB = tuning.Job(id="ftjob-1", tenant="default", created_at=1.0, model="toy", base="toy", training_file="file-1", method={}, seed=1)
MODEL = Model("ft:toy:kivnun::abcdefgh", "default", 1.0, "ftjob-1", "toy", 9, "default/0", "hash")


@pytest.fixture
def db(db: Database) -> Database:
    db.write("job", lambda tx: tuning.create(tx, JOB, new_id))
    return db


def _add(db: Database, *made: Model) -> None:
    for model in made:
        db.write("model", lambda tx, model=model: models.add(tx, model))


def test_a_model_is_found_by_its_owner_until_it_is_deleted_and_by_nobody_else(db: Database) -> None:
    _add(db, MODEL)
    assert db.read(lambda tx: models.find(tx, MODEL.id, "default")) == MODEL
    assert db.read(lambda tx: models.find(tx, MODEL.id, "other")) is None
    assert not db.write("delete", lambda tx: models.delete(tx, MODEL.id, "other", 2.0))
    assert db.write("delete", lambda tx: models.delete(tx, MODEL.id, "default", 2.0))
    assert not db.write("delete", lambda tx: models.delete(tx, MODEL.id, "default", 3.0))
    assert db.read(lambda tx: models.find(tx, MODEL.id, "default")) is None
    assert db.read(lambda tx: models.page(tx, "default")) == ([], False)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 100_000, "\u202eא", "'; drop table models; --"])
def test_a_name_of_any_letters_is_looked_for_and_not_found(db: Database, name: str) -> None:
    assert db.read(lambda tx: models.find(tx, name, "default")) is None
    assert db.read(lambda tx: deployments.find_deployment(tx, "default", name)) is None
    assert db.read(lambda tx: tenants.find_tenant(tx, name)) is None


def test_models_and_checkpoints_are_paged_newest_first(db: Database) -> None:
    steps = [
        replace(MODEL, id=f"{MODEL.id}:ckpt-step-{n}", step=n, checkpoint=f"ftckpt_{n}", created_at=float(n)) for n in (1, 2, 3)
    ]
    _add(db, *steps, replace(MODEL, created_at=4.0))
    late = replace(steps[0], id=f"{MODEL.id}:ckpt-step-4", step=4, checkpoint="ftckpt_4", created_at=0.5)
    found, more = db.read(lambda tx: models.page(tx, "default", 2))
    assert ([model.step for model in found], more) == ([9, 3], True)
    rest, more = db.read(lambda tx: models.page(tx, "default", 2, found[-1].id))
    assert ([model.step for model in rest], more) == ([2, 1], False)
    first, more = db.read(lambda tx: models.checkpoints_page(tx, "ftjob-1", "default", 2))
    assert ([model.checkpoint for model in first], more) == (["ftckpt_3", "ftckpt_2"], True)
    last, more = db.read(lambda tx: models.checkpoints_page(tx, "ftjob-1", "default", 2, "ftckpt_2"))
    assert ([model.checkpoint for model in last], more) == (["ftckpt_1"], False)
    assert db.read(lambda tx: models.checkpoints_page(tx, "ftjob-1", "default", 2, "ftckpt_9")) == ([], False)
    assert db.read(lambda tx: models.checkpoints_page(tx, "ftjob-1", "other", 2)) == ([], False)
    _add(db, late)
    after_jump, _ = db.read(lambda tx: models.checkpoints_page(tx, "ftjob-1", "default", 9))
    assert [model.step for model in after_jump] == [4, 3, 2, 1], "by step, though the clock went back"


def test_an_unfinished_job_that_continues_from_a_model_is_named(db: Database) -> None:
    _add(db, MODEL)
    for job in (replace(JOB, id="ftjob-2", model=MODEL.id), replace(JOB, id="ftjob-3", model=MODEL.id, status="succeeded")):
        db.write("job", lambda tx, job=job: tuning.create(tx, job, new_id))
    assert db.read(lambda tx: models.jobs_from(tx, MODEL.id, "default")) == ["ftjob-2"]


def test_a_checkpoint_that_is_deployed_stays_when_newer_ones_come(db: Database) -> None:
    def expose(step: int) -> None:
        adapter = running.Adapter(step, "default/0", "hash", {})
        db.write("expose", lambda tx: running.expose(tx, JOB, adapter, "kivnun", float(step), new_id))

    expose(10)
    deployed = db.read(lambda tx: models.page(tx, "default")[0][0].id)
    db.write("put", lambda tx: deployments.put(tx, "default", "prod", deployed, {}, 11.0))
    for step in (20, 30, 40, 50):
        expose(step)
    assert [model.step for model in db.read(lambda tx: models.page(tx, "default"))[0]] == [50, 40, 30, 10]


def test_a_deployment_is_made_changed_and_removed_under_its_tenant(db: Database) -> None:
    put = lambda tenant, model, at: db.write("put", lambda tx: deployments.put(tx, tenant, "d", model, {"sku": {}}, at))  # noqa: E731
    assert put("default", "toy", 1.0)[1]
    changed, is_new = put("default", "toy-2", 2.0)
    assert (changed.model, changed.created_at, changed.updated_at, is_new) == ("toy-2", 1.0, 2.0, False)
    assert put("other", "toy", 3.0)[1], "a name is a tenant's own"
    assert db.read(lambda tx: deployments.of_model(tx, "default", "toy-2")) == ["d"]
    assert db.read(lambda tx: deployments.of_model(tx, "default", "toy")) == []
    assert db.write("remove", lambda tx: deployments.remove(tx, "default", "d"))
    assert not db.write("remove", lambda tx: deployments.remove(tx, "default", "d"))
    assert db.read(lambda tx: deployments.find_deployment(tx, "other", "d")) is not None


def test_a_rotated_key_ends_now_or_after_its_grace_and_never_later_than_it_would_have(db: Database) -> None:
    def made(key: str, expires_at: float | None) -> tenants.ApiKey:
        return db.write("key", lambda tx: tenants.add_key(tx, key, "default", "k", ["read"], 10.0, new_id, expires_at))

    def rotated(old: tenants.ApiKey, grace_s: float) -> tuple[tenants.ApiKey, tenants.ApiKey]:
        new = db.write("rotate", lambda tx: tenants.rotate_key(tx, old, tenants.new_key(), 20.0, new_id, grace_s))
        before = db.read(lambda tx: tenants.find_key_of(tx, old.id, "default"))
        assert before is not None
        return new, before

    new, old = rotated(made("one", None), 0)
    assert (old.revoked_at, new.scopes, new.name, new.expires_at) == (20.0, ["read"], "k", None)
    _, old = rotated(made("two", None), 100)
    assert (old.revoked_at, old.expires_at) == (None, 120.0)
    new, old = rotated(made("three", 30.0), 100)
    assert (old.expires_at, new.expires_at) == (30.0, 30.0)


def test_a_dump_of_the_database_holds_no_key_and_no_part_of_one(db: Database) -> None:
    key = tenants.new_key()
    db.write("key", lambda tx: tenants.add_key(tx, key, "default", "k", ["read"], 1.0, new_id))

    def dump(tx: tuning.Transaction) -> str:
        return repr([tuple(row) for made in metadata.sorted_tables for row in tx.execute(sa.select(made))])

    dumped = db.read(dump)
    for held in (key, KEY, OTHER_KEY):
        secret = held.removeprefix(tenants.KEY_PREFIX)
        assert tenants.key_hash(held) in dumped
        assert not any(secret[at : at + 8] in dumped for at in range(len(secret) - 7))


def test_a_key_s_hash_is_compared_in_constant_time(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is asked for a hash, which nobody can steer; the match is confirmed by compare_digest."""
    compared: list[tuple[str, str]] = []
    real = hmac.compare_digest

    def watched(one: str, other: str) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    found = db.read(lambda tx: tenants.find_key(tx, KEY))
    assert found is not None
    assert compared == [(tenants.key_hash(KEY), tenants.key_hash(KEY))]


def test_keys_are_256_random_bits() -> None:
    made = {tenants.new_key() for _ in range(1000)}
    assert len(made) == 1000
    assert {len(key) for key in made} == {len(tenants.KEY_PREFIX) + 43}


def test_a_tenant_s_holdings_are_counted(db: Database) -> None:
    assert db.read(lambda tx: holdings_of(tx, "default")) == Holdings(0, 1, 0, 0)
    assert db.read(lambda tx: holdings_of(tx, "other")) == Holdings(0, 0, 0, 0)


def test_a_tenant_s_own_limits_replace_the_configured_ones_one_by_one(db: Database) -> None:
    db.write("limits", lambda tx: tenants.change_tenant(tx, "other", 2.5, {"files": 7}))
    limits = db.read(lambda tx: tenants.limits_of(tx, "other", tenants.Limits()))
    assert (limits.files, limits.active_jobs) == (7, tenants.Limits().active_jobs)
    changed = db.read(lambda tx: tenants.find_tenant(tx, "other"))
    assert changed is not None
    assert (changed.weight, changed.limits) == (2.5, {"files": 7})
