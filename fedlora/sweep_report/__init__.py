"""The report of a sweep: what its runs say, as one HTML page, figures and Markdown."""
