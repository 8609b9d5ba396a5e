"""One run behind OpenAI's wire: `wire.py` holds questions and answers, `worker.py` the model, `app.py` the HTTP between them."""
