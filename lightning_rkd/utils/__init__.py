"""Types, ranks, files and statistics that every part of the library uses."""
