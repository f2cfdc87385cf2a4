"""Tables and plots as functions of records; no torch."""
