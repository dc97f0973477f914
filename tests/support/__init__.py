"""What several tests share: small data sets, stand-in networks, a local Hub."""
