"""Models on the Hugging Face Hub: headers by byte ranges, files into its download cache."""
