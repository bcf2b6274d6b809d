"""Benchmarks of whole runs: what they read, hold and wait for, and how near a plan comes; with zoos made for them."""
