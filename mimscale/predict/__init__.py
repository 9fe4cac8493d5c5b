"""Files -> masks on their own grids, by one fine-tuned network or several, without a store."""
