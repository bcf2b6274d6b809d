"""Ways to read latents: absorbed into queries, rebuilt, interpolated, by a Triton kernel; and which one serves.

Storing latents, masks and whole attention are one room up.
"""
