"""What commands print on, and tables and progress that fit it.

Nothing here asks a store or Ray.
"""
