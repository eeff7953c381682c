"""Examples and who holds them: data files, tokenised examples, batches and populations, without torch."""
