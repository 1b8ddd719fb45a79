"""One module for each figure and table: what is run for it, and what is made of the results."""
