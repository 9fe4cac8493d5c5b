"""Tables of targets of whole volumes, and scores of predictions: for probes, fine-tuning and evaluation alike."""
