"""What a model is: its facts from a config, its tensors in a checkpoint, its rotation, the blocks of its channels.

How a model runs with a compressed cache is in `attention`; what is computed from its weights in `decomposition`.
"""
