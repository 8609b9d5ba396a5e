"""Kivnun's LoRA engine on a CUDA device beside TRL or PEFT: `python -m benchmarks.gpu`."""
