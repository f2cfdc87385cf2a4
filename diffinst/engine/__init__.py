"""Training, evaluation and prediction as functions."""
