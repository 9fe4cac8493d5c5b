"""Sliding-window inference, metrics, reconstructions, prediction export."""
