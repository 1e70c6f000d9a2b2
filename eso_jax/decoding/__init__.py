"""Sampling: which token is decoded when (plan.py), in which passes (passes.py), the decoding loop (loop.py), decoders
that choose as they go (decoders.py), and how a token is drawn (categorical.py)."""
