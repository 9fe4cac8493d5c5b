"""Volumes -> store: one reader a format, geometry, intensity, conversion, receipts."""
