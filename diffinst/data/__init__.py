"""Data sets: readers, the generated shapes, transforms, samplers, loaders."""
