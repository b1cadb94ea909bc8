"""Variants compared fairly: from a question to a report."""
