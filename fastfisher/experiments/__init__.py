"""The paper's experiments, from a recipe to one report."""
