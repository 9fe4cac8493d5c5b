"""Pretraining and evaluation of 3D medical image models on clusters."""
