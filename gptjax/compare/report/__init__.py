"""A comparison as a person reads it: a page, the same in Markdown, and files for machines."""
