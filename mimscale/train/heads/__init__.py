"""Networks that are fine-tuned: `head: NAME` of a recipe is HEAD of the file NAME.py here."""
