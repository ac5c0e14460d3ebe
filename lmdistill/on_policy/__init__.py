"""On-policy distillation: a student learns from what its teacher says of the student's own completions."""
