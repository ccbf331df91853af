"""Studies of docs/results.md whose runs are short: lists of runs, resumable over days."""
