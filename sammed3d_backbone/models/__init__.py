"""The network in plain torch: no I/O, no downloads, no MONAI."""
