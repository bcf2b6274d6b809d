"""What steps leave on disk: the store, its artifacts, the tables.

What computes them is in `steps`.
"""
