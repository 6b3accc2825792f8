"""What both command lines share: recipes from YAML, one line for a mistake, progress, the machine, processes."""
