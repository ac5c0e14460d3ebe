"""Distillation on cached signals, on transformers.Trainer."""
