"""The report of a bundle: page, plots and tables."""
