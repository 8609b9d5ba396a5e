"""The tables. What each row means is said here once; the transactions over them are in the other modules of this package.

Times are seconds since 1970 by the wall clock, for people; nothing waits or expires by comparing two machines' clocks but what a
person set a date for. Money is in millionths of the configured currency. Every table that holds what belongs to somebody names
its tenant. Next: `database.py`, `tuning.py`.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s_%(column_0_name)s", "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)  # fmt: skip


def _tenant() -> sa.Column[str]:
    return sa.Column("tenant", sa.Text, sa.ForeignKey("tenants.id"), nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float(53), nullable=nullable)


# --- who --------------------------------------------------------------------------------------------------------------------

tenants = sa.Table(
    "tenants", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _time("created_at"),
    sa.Column("weight", sa.Float(53), nullable=False),  # of its share of the queue
    # The two marks of `queue.py`, in tokens over the weight: where its last job began, and where that one will end.
    sa.Column("began", sa.Float(53), nullable=False, default=0.0),
    sa.Column("served", sa.Float(53), nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),  # what differs from the configured limits
)  # fmt: skip

api_keys = sa.Table(
    "api_keys", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("hint", sa.Text, nullable=False),  # the last four letters, to tell keys apart
    sa.Column("hash", sa.Text, nullable=False, unique=True),  # SHA-256 of the key
    sa.Column("scopes", sa.JSON, nullable=False),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("revoked_at", nullable=True),
    _time("last_used_at", nullable=True),
)  # fmt: skip

# --- what was uploaded ------------------------------------------------------------------------------------------------------

files = sa.Table(
    "files", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("created_at"),
    _time("expires_at", nullable=True),
    _time("deleted_at", nullable=True),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("blob", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # uploaded, processed, error
    sa.Column("status_details", sa.Text, nullable=True),
    sa.Column("facts", sa.JSON, nullable=True),  # what the judgement found: format, rows, counts of problems
    sa.Column("report", sa.Text, nullable=True),  # blob of the judgement, line by line
    sa.Index("ix_files_tenant_created", "tenant", "created_at", "id"),
)  # fmt: skip

uploads = sa.Table(
    "uploads", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("created_at"),
    _time("expires_at"),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("mime_type", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # pending, completed, cancelled, expired
    sa.Column("file", sa.Text, nullable=True),
    sa.Column("file_expires_after", sa.BigInteger, nullable=True),
)  # fmt: skip

upload_parts = sa.Table(
    "upload_parts", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("upload", sa.Text, sa.ForeignKey("uploads.id"), nullable=False, index=True),
    _time("created_at"),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("blob", sa.Text, nullable=False),
)  # fmt: skip

# --- tuning -----------------------------------------------------------------------------------------------------------------

jobs = sa.Table(
    "jobs", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("created_at"),
    sa.Column("status", sa.Text, nullable=False),  # states.Status
    # As asked for.
    sa.Column("model", sa.Text, nullable=False),  # a base's id, a tuned model or a checkpoint
    sa.Column("base", sa.Text, nullable=False),  # the configured id of the base below it
    sa.Column("training_file", sa.Text, nullable=False),
    sa.Column("validation_file", sa.Text, nullable=True),
    sa.Column("method", sa.JSON, nullable=False),  # {"type": "supervised", "supervised": {"hyperparameters": {...}}}
    sa.Column("suffix", sa.Text, nullable=True),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=True),
    sa.Column("integrations", sa.JSON, nullable=True),
    sa.Column("extensions", sa.JSON, nullable=False),  # x_lora and others, as given
    # As decided when its files were judged.
    sa.Column("hyperparameters", sa.JSON, nullable=False),  # resolved numbers; "auto" until then
    sa.Column("spec", sa.Text, nullable=True),  # the TuneSpec that every worker runs, as YAML
    sa.Column("total_steps", sa.BigInteger, nullable=True),
    sa.Column("planned_tokens", sa.BigInteger, nullable=True),  # trained tokens of the whole job
    sa.Column("planned_seconds", sa.Float(53), nullable=True),
    sa.Column("facts", sa.JSON, nullable=False),  # tuning.Job.facts: what else was found then
    _time("queued_at", nullable=True),
    # As it goes.
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
    _time("estimated_finish", nullable=True),
    sa.Column("step", sa.BigInteger, nullable=False),  # the last one reported
    sa.Column("trained_tokens", sa.BigInteger, nullable=False),  # of the steps reported
    sa.Column("crashes", sa.BigInteger, nullable=False, default=0),  # of its trainer, since the last snapshot
    sa.Column("num_events", sa.BigInteger, nullable=False),  # the number of the last event
    sa.Column("tuned_model", sa.Text, nullable=True),
    sa.Column("result_files", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON, nullable=True),  # {"code", "message", "param"}
    sa.Index("ix_jobs_tenant_created", "tenant", "created_at", "id"),
    sa.Index("ix_jobs_status", "status"),
)  # fmt: skip

job_events = sa.Table(
    "job_events", metadata,
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True),  # from 1, without gaps
    sa.Column("id", sa.Text, nullable=False, unique=True),
    _time("created_at"),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)  # fmt: skip

commands = sa.Table(
    "commands", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.id"), nullable=False, index=True),
    _time("created_at"),
    sa.Column("kind", sa.Text, nullable=False),  # states.Command
    _time("applied_at", nullable=True),  # when nothing was left to do about it
)  # fmt: skip

# A commit of training: everything a run needs to go on, as blobs named in one manifest. The row is the truth.
snapshots = sa.Table(
    "snapshots", metadata,
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.id"), primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True),  # of the lease it was written under
    sa.Column("step", sa.BigInteger, primary_key=True),
    _time("created_at"),
    sa.Column("manifest", sa.Text, nullable=False),  # blob: {"files": [{"path", "blob", "bytes"}]}
)  # fmt: skip

models = sa.Table(
    "models", metadata,
    sa.Column("id", sa.Text, primary_key=True),  # ft:base:tenant:suffix:id8, with :ckpt-step-n where it is a checkpoint
    _tenant(),
    _time("created_at"),
    _time("deleted_at", nullable=True),
    sa.Column("job", sa.Text, sa.ForeignKey("jobs.id"), nullable=False, index=True),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("checkpoint", sa.Text, nullable=True, unique=True),  # ftckpt_..., where it is one
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),  # blob, as of a snapshot: the adapter's folder
    sa.Column("content_hash", sa.Text, nullable=False),  # of the adapter: what every answer names and checks
)  # fmt: skip

deployments = sa.Table(
    "deployments", metadata,
    _tenant(),
    sa.Column("name", sa.Text, nullable=False),
    _time("created_at"),
    _time("updated_at"),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),  # sku and properties as given
    sa.PrimaryKeyConstraint("tenant", "name"),
)  # fmt: skip

leases = sa.Table(
    "leases", metadata,
    sa.Column("name", sa.Text, primary_key=True),  # job:ftjob-..., file:file-..., duty:webhooks
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.Text, nullable=True),  # None: given back
    sa.Column("beat", sa.BigInteger, nullable=False),
)  # fmt: skip

# --- retries ----------------------------------------------------------------------------------------------------------------

accepted = sa.Table(
    "accepted", metadata,  # creates that were accepted, so that the same one sent again gives the same object
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("created_at"),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=True),  # Idempotency-Key
    sa.Column("body_hash", sa.Text, nullable=False),
    sa.Column("object_id", sa.Text, nullable=False),
    sa.Column("retries", sa.BigInteger, nullable=False),  # the highest x-stainless-retry-count that was matched
    sa.UniqueConstraint("tenant", "route", "key"),
    sa.Index("ix_accepted_body", "tenant", "route", "body_hash"),
)  # fmt: skip

# --- money ------------------------------------------------------------------------------------------------------------------

usage = sa.Table(
    "usage", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("at"),  # the first second of an hour
    sa.Column("kind", sa.Text, nullable=False),  # training, prompt, completion
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("job", sa.Text, nullable=True),
    sa.Column("api_key", sa.Text, nullable=True),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("price", sa.Text, nullable=False),  # of a million tokens
    sa.Column("cost_micros", sa.BigInteger, nullable=False),
    sa.Index("ix_usage_tenant_at", "tenant", "at"),
)  # fmt: skip

# --- telling others ---------------------------------------------------------------------------------------------------------

webhook_endpoints = sa.Table(
    "webhook_endpoints", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("created_at"),
    _time("updated_at"),
    _time("deleted_at", nullable=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("event_types", sa.JSON, nullable=False),
    sa.Column("secrets", sa.JSON, nullable=False),  # see `webhooks.Endpoint`; the newest first
)  # fmt: skip

outbox = sa.Table(
    "outbox", metadata,  # what is to be told, written with what happened
    sa.Column("id", sa.Text, primary_key=True),  # evt_...
    _tenant(),
    _time("created_at"),
    sa.Column("type", sa.Text, nullable=False),  # fine_tuning.job.succeeded and so on
    sa.Column("data", sa.JSON, nullable=False),  # {"id": ...}
    _time("fanned_out_at", nullable=True),  # when a delivery was made for each endpoint
    sa.Index("ix_outbox_fanned_out", "fanned_out_at"),
)  # fmt: skip

deliveries = sa.Table(
    "deliveries", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("event", sa.Text, sa.ForeignKey("outbox.id"), nullable=False),
    sa.Column("endpoint", sa.Text, sa.ForeignKey("webhook_endpoints.id"), nullable=False),
    _tenant(),
    _time("created_at"),
    sa.Column("status", sa.Text, nullable=False),  # pending, delivered, dead
    sa.Column("attempts", sa.BigInteger, nullable=False),
    _time("next_at"),
    _time("give_up_at"),  # the last attempt is made then
    sa.Column("last_answer", sa.Text, nullable=True),  # a status, or why there was none
    sa.UniqueConstraint("event", "endpoint"),
    sa.Index("ix_deliveries_status_next", "status", "next_at"),
    sa.Index("ix_deliveries_endpoint_created", "endpoint", "created_at", "id"),
)  # fmt: skip

# --- batches ----------------------------------------------------------------------------------------------------------------

batches = sa.Table(
    "batches", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _tenant(),
    _time("created_at"),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("dialect", sa.Text, nullable=False),  # of the path it was asked for at, which tells what names its lines mean
    sa.Column("api_key", sa.Text, nullable=False),  # the id of the key that asked for it: its usage is that key's
    sa.Column("input_file", sa.Text, nullable=False),
    sa.Column("completion_window", sa.Text, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=True),
    sa.Column("model", sa.Text, nullable=True),  # of all its lines, known once they are validated
    sa.Column("errors", sa.JSON, nullable=True),  # [{"code", "message", "param", "line"}]
    sa.Column("usage", sa.JSON, nullable=True),  # sums of its answers' usage, known at the end
    sa.Column("output_file", sa.Text, nullable=True),
    sa.Column("error_file", sa.Text, nullable=True),
    sa.Column("output_expires_after", sa.BigInteger, nullable=True),
    sa.Column("times", sa.JSON, nullable=False),  # in_progress_at and the others
    sa.Column("total", sa.BigInteger, nullable=False),
    sa.Column("completed", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.BigInteger, nullable=False),
    sa.Index("ix_batches_tenant_created", "tenant", "created_at", "id"),
    sa.Index("ix_batches_status", "status"),
)  # fmt: skip

batch_answers = sa.Table(
    "batch_answers", metadata,
    sa.Column("batch", sa.Text, sa.ForeignKey("batches.id"), primary_key=True),
    sa.Column("line", sa.BigInteger, primary_key=True),  # of the input file, from 1
    sa.Column("ok", sa.Boolean, nullable=False),
    sa.Column("body", sa.JSON, nullable=False),  # the line of the output or of the error file
)  # fmt: skip

# --- who answers ------------------------------------------------------------------------------------------------------------

answerers = sa.Table(
    "answerers", metadata,  # inference workers that can be reached
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("base", sa.Text, nullable=False, index=True),
    sa.Column("address", sa.Text, nullable=False),  # unix:PATH or HOST:PORT
    sa.Column("machine", sa.Text, nullable=False),  # where a socket of one machine alone is
    sa.Column("secret", sa.Text, nullable=False),  # what a caller shows first
    sa.Column("beat", sa.BigInteger, nullable=False),  # rises for as long as the worker lives
    _time("created_at"),
)  # fmt: skip

wanted_bases = sa.Table(
    "wanted_bases", metadata,  # bases without a resident worker, how often each was asked for, and why it is not loaded
    sa.Column("base", sa.Text, primary_key=True),
    sa.Column("asks", sa.BigInteger, nullable=False),
    sa.Column("refused", sa.Text),
)  # fmt: skip
