"""Parts that several losses share: memory banks, queues, projectors, checks."""
