"""The aggregator: spectra of all layers in, a rank for each out, within a budget.

Nothing here sees a tensor or a model; what schedules measure is in `measurement`.
"""
