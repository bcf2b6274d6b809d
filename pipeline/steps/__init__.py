"""Units of work, and how they depend on each other.

The mathematics is in `lorc_core`; what is left on disk in `storage`.
"""
