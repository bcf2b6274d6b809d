"""How a run stands: counts of each model's steps, what runs, what failed, when it will end; kept in a file.

Who draws it, while the run goes on or after, is in `jobs`.
"""
