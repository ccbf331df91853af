"""Image augmentation and batch transforms."""
