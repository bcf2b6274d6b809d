"""Units of work, how they depend on each other, and where they run.

The mathematics is in `lorc_core`; what is left on disk in `storage`.
"""
