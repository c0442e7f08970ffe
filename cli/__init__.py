"""The command line, and how it finds ComfyUI."""
