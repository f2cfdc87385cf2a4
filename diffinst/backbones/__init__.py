"""Feature extractors: one contract, named maps with channels and strides."""
