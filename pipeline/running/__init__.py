"""Steps at work: which runs when and where on Ray, and what one does in its worker.

The only room that knows Ray.
"""
