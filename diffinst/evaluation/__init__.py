"""Scores from stored predictions; no model needed."""
