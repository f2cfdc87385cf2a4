"""The HTML page of a suite: one file without a script, without network, for light and dark screens."""
