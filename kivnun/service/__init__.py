"""The hosted API: OpenAI's and Azure's dialects over the records of `kivnun.jobs`. Loads no model."""
