"""What a user can put right. Each message says what was wrong, where, what is allowed and the way out.

These are raised by library code and caught only in the command line tools, which print one line and exit with code 2.
"""


class DiffInstError(Exception):
    """Base of all errors that a user can put right; `str(error)` is one line."""


class ConfigError(DiffInstError):
    """A configuration value is unknown, of the wrong type or impossible."""


class DataError(DiffInstError):
    """An image, an annotation or a data set is missing or malformed."""


class CheckpointError(DiffInstError):
    """A checkpoint is missing, truncated, corrupt or belongs to another model."""


class TrainingError(DiffInstError):
    """Training cannot go on, for instance because a loss is not finite."""
