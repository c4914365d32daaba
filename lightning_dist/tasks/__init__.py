"""Tasks: subclasses of DistillModule with the steps and metrics of one field each."""
