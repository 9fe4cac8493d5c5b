"""Store -> batches: sample plan, crops, loader, device prefetch."""
