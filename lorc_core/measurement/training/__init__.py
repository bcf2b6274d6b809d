"""Trained projections: a variant's latents rotated by distillation from the untouched model, LoRA beside them.

Settings are `methods.Training`; what a trained variant runs with is in `attention`.
"""
