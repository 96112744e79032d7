"""One file per architecture (its op graph), and the loader of Hugging Face folders."""
