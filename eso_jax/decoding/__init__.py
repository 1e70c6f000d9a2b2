"""Sampling: what is decoded when (plan.py), how a token is drawn (categorical.py), the decoding loop (loop.py)."""
