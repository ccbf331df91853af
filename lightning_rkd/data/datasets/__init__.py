"""Image data sets in memory or on disk, and the archives that they come in."""
