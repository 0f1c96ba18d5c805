"""What leaves the house: program folders and Hugging Face checkpoints."""
