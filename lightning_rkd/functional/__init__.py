"""Pure tensor maths on batches: what holds between samples, apart from any network."""
