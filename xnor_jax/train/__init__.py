"""Training: recipes, the step, the loop, checkpoints and the report."""
