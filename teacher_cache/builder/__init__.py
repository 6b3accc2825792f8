"""The steps from a recipe to a sealed cache. A command is a sequence of them."""
