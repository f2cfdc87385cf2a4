"""The diffusion process over boxes; knows no image and no network."""
