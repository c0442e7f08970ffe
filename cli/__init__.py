"""The command line. It finds and loads ComfyUI where a command needs it."""
