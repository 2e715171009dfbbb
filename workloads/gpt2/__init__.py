"""GPT-2: several yes/no labels of a text, or a language model."""
