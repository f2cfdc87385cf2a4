"""How sure a number is: intervals, differences, noise. Loads neither torch nor the model."""
