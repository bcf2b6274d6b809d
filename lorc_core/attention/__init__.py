"""A model at work on latents: attach and detach, the cache's view, attention over what it holds.

The ways to score keys are in `scores`; checkpoints that bring their own factors in `standalone`.
"""
