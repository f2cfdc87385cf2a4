"""DiffusionInst (arXiv:2212.02773) in PyTorch: instance segmentation by denoising boxes."""

__version__ = "0.1.0"
