"""The report of a comparison: an HTML page, the same in Markdown, and results as data."""
