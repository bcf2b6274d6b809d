"""The one formula: second moments in, nested factors and spectra out; bounds and errors of projections.

What needs text and a forward pass is in `measurement`; how many ranks are kept in `ranks`.
"""
