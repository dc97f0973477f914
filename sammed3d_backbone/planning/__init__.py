"""From a folder of labelled scans to a configuration that the fine-tuning recipe runs as it is."""
