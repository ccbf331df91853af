"""The distillation engine: reads features, calls the teacher, gathers rows over ranks and computes loss terms."""
