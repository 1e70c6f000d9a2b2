"""A run: its training loop, its folder, its checkpoints, its processes, its clock."""
