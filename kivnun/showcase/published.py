"""The published figures that the showcase stands beside: "Before and After Finetuning" for six Phi-3 models on TruthfulQA.

They are copied from a bar chart in Microsoft's Phi-3 cookbook (page FineTuning_Scenarios, 2024) as it shows them. Next: `page.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "the chart “Before and After Finetuning” in Microsoft’s Phi-3 cookbook, page “FineTuning_Scenarios” (2024)"


@dataclass(frozen=True, slots=True)
class Published:
    """One model's figures in per cent, (base, tuned) each, as published."""

    model: str
    robust: tuple[float, float]
    mc1: tuple[float, float]
    mc2: tuple[float, float]


PUBLISHED = (
    Published("phi-3-mini-4k", (56.3, 80.7), (57.9, 89.4), (67.6, 99.3)),
    Published("phi-3-mini-128k", (54.3, 82.5), (57.6, 90.9), (64.9, 99.4)),
    Published("phi-3-small-8k", (67.4, 90.9), (71.6, 96.2), (75.1, 99.6)),
    Published("phi-3-small-128k", (65.0, 86.0), (70.3, 92.7), (72.2, 98.5)),
    Published("phi-3-medium-4k", (73.8, 93.3), (74.1, 98.3), (75.5, 99.7)),
    Published("phi-3-medium-128k", (67.3, 92.9), (72.9, 97.8), (76.0, 99.8)),
)

NOT_KNOWN = (
    "what the models were trained on, and whether the test questions were in it",
    "how questions were split: TruthfulQA has 817 questions and no training part",
    "the method (full tuning or LoRA), its learning rate, its epochs",
    "how the questions were put to the model",
    "what “robustness” means: the chart does not define it; ours is defined below",
    "how many questions, seeds or repetitions stand behind a bar; there is no interval",
    "whether anything else was measured, so that forgetting would be seen",
    "two labels: in the chart the base’s first two figures for phi-3-medium-4k overlap; 73.8 and 74.1 are our reading",
)
