"""What needs text and a forward or backward pass: calibration, probes, exchanges of ranks, training.

What weights alone tell is in `decomposition`.
"""
