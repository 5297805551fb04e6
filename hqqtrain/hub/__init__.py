"""Push the results of a run to the Hugging Face Hub."""
