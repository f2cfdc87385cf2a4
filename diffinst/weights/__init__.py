"""Weights of the released code, in and out: pickles read without running them, names, and sizes."""
