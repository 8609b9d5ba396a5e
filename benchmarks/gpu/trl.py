"""TRL's own trainer as a side. A `step` is one call of `train` for one step; only what the trainer calls its step is timed.

Settings are those of `Peft` in `sides.py` (bfloat16 autocast, float32 adapter); a trainer is made once per list of rows.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.engine.workload import ALPHA, RANK, Model
from benchmarks.gpu.sides import RATE, Absent, Step, built, now
from kivnun.data.rows import TokenRow


def missing() -> str:
    """Return why TRL cannot be measured here ("": it can)."""
    absent = [name for name in ("trl", "datasets", "accelerate") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


class Trl:
    """SFTTrainer under PEFT."""

    def __init__(self, model: Model, longrope: bool, precision: str, recompute: bool, device: str, padding_free: bool) -> None:
        if precision == "nf4":
            raise Absent("TRL on a model that was made in memory has no QLoRA")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._shape, self._recompute, self._padding_free, self._device = model, recompute, padding_free, device
        self._base = built(model, longrope, device)
        flash = padding_free and device == "cuda" and importlib.util.find_spec("flash_attn") is not None
        self._base.set_attn_implementation("flash_attention_2" if flash else "sdpa")
        self._trainer: Any = None
        self._made_for: Sequence[TokenRow] = ()
        self._each = 0
        self._folder = tempfile.TemporaryDirectory()
        self._peft: Any = None
        self._began = self._ended = 0.0
        self.facts = {"attention": "FlashAttention 2" if flash else "torch's SDPA"}

    def step(self, rows: Sequence[TokenRow], pass_tokens: int) -> Step:
        lengths = [row.length for row in rows]
        # TRL counts rows: with padding the longest decides how many fit, without it their mean.
        each = max(1, round(pass_tokens / (sum(lengths) / len(rows) if self._padding_free else max(lengths))))
        if self._made_for is not rows or self._each != each:
            self._trainer, self._made_for, self._each = self._new_trainer(rows, each), rows, each
        loss = float(self._trainer.train().training_loss)
        return Step(loss, self._ended - self._began)

    def _new_trainer(self, rows: Sequence[TokenRow], each: int) -> Any:
        from datasets import Dataset
        from peft import LoraConfig
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast, TrainerCallback
        from transformers.trainer_callback import PrinterCallback
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        side = self

        class Clock(TrainerCallback):
            def on_step_begin(self, *_args: object, **_named: object) -> None:
                side._began = now()

            def on_step_end(self, *_args: object, **_named: object) -> None:
                side._ended = now()

        words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(self._shape.vocab)}, unk_token="<3>"))
        special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<3>"}
        fewer = min(each, len(rows))
        settings: dict[str, Any] = {"padding_free": self._padding_free}
        if self._recompute:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        config = SFTConfig(
            output_dir=self._folder.name, per_device_train_batch_size=fewer, gradient_accumulation_steps=-(-len(rows) // fewer),
            max_steps=1, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
            train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
            max_length=None, bf16=True, gradient_checkpointing=self._recompute, use_cpu=self._device == "cpu", **settings,
        )  # fmt: skip
        adapter = LoraConfig(
            r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        )
        trainer = SFTTrainer(
            model=self._peft or self._base,
            args=config,
            train_dataset=Dataset.from_list([{"input_ids": row.ids.tolist()} for row in rows]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
            peft_config=None if self._peft is not None else adapter,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)  # its lines would go between ours
        self._peft = trainer.model
        return trainer
