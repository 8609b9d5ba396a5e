"""Answers over OpenAI's wire, by two doors: one run on this machine (`app.py`, `wire.py`, `worker.py`), and the inference workers
of the hosted service.

Of the latter, `question.py`, `tools.py`, `constraints.py` and `reply.py` hold what is asked and told, and load no model;
`protocol.py` and `listening.py` are the way between the API and a worker; `scheduler.py` computes, `adapters.py` brings adapters,
`toy.py` stands in for a model in tests.
"""
