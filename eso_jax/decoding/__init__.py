"""Sampling: what is decoded when (plan.py), in which passes (passes.py), how a token is drawn (categorical.py), the
decoding loop (loop.py)."""
