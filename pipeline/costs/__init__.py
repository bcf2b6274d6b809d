"""What steps take before they run: their work by shapes alone, and seconds from unit costs that were measured.

Nothing here reads a weight; the runner orders steps by it, and `simulation` plans with it.
"""
