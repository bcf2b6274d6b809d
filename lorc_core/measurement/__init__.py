"""What needs text and a pass of the model: calibration, probes, exchanges of ranks; in `training`, distillation.

What weights alone tell is in `decomposition`.
"""
