"""`lorc bench`: speed and memory as ratios within one run.

What accuracy costs is measured by `jobs.quality`.
"""
