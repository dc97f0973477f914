"""Studies of this project: what was asked, how it was measured, and what came out."""
