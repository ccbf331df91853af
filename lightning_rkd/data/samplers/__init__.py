"""Batch samplers for metric learning and few-shot learning."""
