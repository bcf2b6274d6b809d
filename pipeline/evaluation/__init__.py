"""A model at work on windows of tokens: where it lies, what it loses, and whether that is too much.

What is scored when, and where the scores go, is in `steps`.
"""
