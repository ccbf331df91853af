"""What several losses share: state that changes from step to step, memory banks, projectors."""
