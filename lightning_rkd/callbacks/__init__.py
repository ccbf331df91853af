"""Callbacks that attach to any LightningModule."""
