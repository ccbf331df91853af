"""Commands of ``lightning-rkd`` beside those of LightningCLI: one file each, with a ``main(args)``."""
