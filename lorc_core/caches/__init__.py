"""What a cache must be and holds: whether latents fit it, appending in place, bytes.

How latents get into it and are read is in `attention`.
"""
