"""How far a run is, for a screen or for whoever asks from another terminal.

What tells it is `steps.outcome.Listener`; how it looks is the business of `jobs`.
"""
