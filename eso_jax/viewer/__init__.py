"""Watching a generation: a page that plays it (page.py), a terminal that shows it as it comes (terminal.py)."""
