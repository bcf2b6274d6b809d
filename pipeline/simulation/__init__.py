"""A zoo's run before it is run: its steps on a cluster that is declared, in the order that the runner would take.

Configs alone are read, so neither weights nor GPUs nor a network are needed.
"""
