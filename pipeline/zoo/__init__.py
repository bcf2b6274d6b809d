"""What a zoo file may say, and what it means for a model: schema, methods, texts, limits.

What is done about it is in `steps`.
"""
