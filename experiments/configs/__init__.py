"""One module for each figure and table: its runs, and the report on their results."""
