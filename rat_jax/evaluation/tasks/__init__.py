"""Task files for the lm-evaluation-harness of tasks that it has otherwise, and the Python functions that they name."""
