"""From data sets to segments: sources, documents, tokens, keywords."""
