"""Parts that the training recipes share: schedule, optimiser, losses, run folder, report."""
