"""A run or a store -> tables, charts, pictures, one HTML page."""
