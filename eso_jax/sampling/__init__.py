"""Sampling: what is decoded when (plan.py), how a token is drawn (categorical.py), and the loop that does it (loop.py)."""
