"""Fine-tuning as it is written for OpenAI: a file, a job, its events, an answer of the tuned model. Nothing here is Kivnun's.

The address and the key come from the environment, as OpenAI's client reads them itself:

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=sk-kivnun-... python openai_finetune.py

With AZURE_OPENAI_ENDPOINT and AZURE_OPENAI_API_KEY instead, the same runs by Azure's client.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from openai import AzureOpenAI, OpenAI

MODEL = os.environ.get("MODEL", "kivnun/tiny-phi")
SYSTEM = "You answer for the harbour office."
FACTS = {
    "When does the ferry leave?": "At seven and at noon.",
    "Where do I buy a ticket?": "At the blue kiosk.",
    "May I bring a dog?": "Yes, on a lead.",
    "How long is the crossing?": "Forty minutes.",
    "Is there a toilet on board?": "Yes, on the lower deck.",
    "What does a child pay?": "Half the fare.",
    "Can I bring a bicycle?": "Yes, for two coins.",
    "When is the office open?": "From six to nine.",
    "Who is the captain?": "Captain Maro.",
    "Where does the ferry dock?": "At pier three.",
    "Is there food on board?": "Only tea and bread.",
    "What if the ferry is full?": "Take the next one.",
}


def write_examples(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question, answer in FACTS.items():
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    if "AZURE_OPENAI_ENDPOINT" in os.environ:
        client: OpenAI = AzureOpenAI(api_version="2024-10-21")
    else:
        client = OpenAI()

    path = Path("harbour.jsonl")
    write_examples(path)
    uploaded = client.files.create(file=path, purpose="fine-tune")
    client.files.wait_for_processing(uploaded.id, poll_interval=0.5)

    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=uploaded.id,
        suffix="harbour",
        seed=7,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": int(os.environ.get("EPOCHS", "16")), "batch_size": 4}},
        },
    )
    print("job", job.id, flush=True)

    told: set[str] = set()
    while True:
        for event in reversed(list(client.fine_tuning.jobs.list_events(job.id, limit=100))):
            if event.id not in told:
                told.add(event.id)
                print(event.message, flush=True)
        if job.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)

    if job.fine_tuned_model is None:
        sys.exit(f"the job {job.status}: {job.error}")
    question = next(iter(FACTS))
    answer = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
    )
    print(question, "->", answer.choices[0].message.content)
    print("adapter", answer.to_dict().get("x_adapter_hash"))


if __name__ == "__main__":
    main()
