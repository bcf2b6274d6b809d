"""Models as they are stored: where, their files, single tensors of them, and whether all of them are there.

What the tensors mean is `architecture`'s to say; what they are read for is in `decomposition`.
"""
