"""The data of clients: data files, tokenised examples, batches and populations, without torch."""
