"""The command line program ``lightning-rkd``."""
