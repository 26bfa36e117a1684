"""What the trainer reads: tokenised files, corpora, the tokenizer, and generated examples."""
