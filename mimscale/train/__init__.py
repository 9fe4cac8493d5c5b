"""Engine, optimiser, checkpoints, meter and the loops for pretraining and fine-tuning."""
