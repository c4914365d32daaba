"""Tasks: DistillModules with the steps and metrics of a field."""
