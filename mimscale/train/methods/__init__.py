"""Methods of pretraining: `method: NAME` of a recipe is METHOD of the file NAME.py here."""
