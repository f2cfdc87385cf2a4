"""The released initialisation of the head, faults included."""

from __future__ import annotations

from torch import nn

from diffinst.heads.box_head import PRIOR_BIAS


def released_init_(modules: list[nn.Module], num_classes: int) -> None:
    """Re-initialises the head as the release does, which finds the class bias by its shape.

    Every parameter whose last dimension is `num_classes` or `num_classes + 1` becomes the class bias' constant, about
    -4.6, whatever it is: with 2 or 3 classes this hits all 3x3 convolutions of the mask branch, with 3 or 4 the bias of
    the box deltas, with 1 the projection to the mask features. 80 classes are unaffected. Kept to reproduce the release
    (`init: released`); the constructors of the modules themselves do what was meant.

    Args:
        modules: box head and mask branch.
        num_classes: K.
    """
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            if parameter.shape[-1] in (num_classes, num_classes + 1):
                nn.init.constant_(parameter, PRIOR_BIAS)
