"""The only code that touches ComfyUI's internals: expert attachment, sampling, progress, version differences."""
