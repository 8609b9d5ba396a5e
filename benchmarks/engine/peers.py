"""The peer's side: one process that trains the same steps with TRL's SFTTrainer and PEFT, and prints a line.

`python -m benchmarks.engine.peers JSON`. Settings are those of the case; "out of the box" leaves SFTConfig's defaults (float32
weights under bfloat16 autocast, gradient checkpointing, padding). Rows, order, learning rate and clipping are the same as ours.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.engine.cases import Case, from_json
from benchmarks.engine.meter import Meter, print_runs
from benchmarks.engine.workload import adapter_folder, draw_rows, model_folder


def main() -> None:
    (case,), work = from_json(sys.argv[1])
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(case.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as output:
        print_runs([_train(case, Path(work), output).run({})])


def _train(case: Case, work: Path, output: str) -> Meter:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_trainer import SFTTrainer

    meter = Meter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs) -> None:
            meter.begin_step()

        def on_step_end(self, *_args, **_kwargs) -> None:
            meter.end_clock()

    folder = model_folder(work, case.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = PeftModel.from_pretrained(model, adapter_folder(work, case.model, case.variant), is_trainable=True)
    rows = draw_rows(case.steps * case.rows)
    trainer = SFTTrainer(
        model=model,  # type: ignore[arg-type]
        args=_settings(case, output),
        train_dataset=Dataset.from_list(
            [{"input_ids": list(row.ids), "assistant_masks": [int(s) for s in row.supervised]} for row in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = 0
    for entry in logged:
        meter.add(int(entry["num_tokens"]) - seen, entry["loss"], entry["grad_norm"])
        seen = int(entry["num_tokens"])
    return meter


def _settings(case: Case, output: str):
    from trl.trainer.sft_config import SFTConfig

    chosen: dict[str, Any] = (
        {} if case.out_of_the_box else {"bf16": False, "gradient_checkpointing": False, "padding_free": case.padding_free}
    )
    if case.padding_free:
        chosen["max_length"] = None  # TRL asks for it; no row is longer than its default
    return SFTConfig(
        output_dir=output,
        per_device_train_batch_size=case.device_batch,
        gradient_accumulation_steps=case.rows // case.device_batch,
        max_steps=case.steps,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=case.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **chosen,
    )


if __name__ == "__main__":
    main()
