"""Another tokenizer: what two vocabularies spell, and a cache told again in a student's tokens."""
