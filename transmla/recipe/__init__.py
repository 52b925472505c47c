"""What the user asks: the schema of a recipe, and how one is composed from YAML and overrides."""
