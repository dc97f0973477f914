"""The weights that ship with the package, with their card and sums; read by importlib.resources."""
