"""Studies of this project: scripts, configurations and results."""
