"""The denoiser: who sees whom, attention, the transformer, its cache and its head."""
