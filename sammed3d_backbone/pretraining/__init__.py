"""Training the promptable network from clicks: losses, samples and initialisation."""
