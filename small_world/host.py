"""The real ComfyUI and the pack in it, for scripts that run without its server; COMFYUI_PATH names it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from cli.launch import find_comfyui, load_pack

# pack("nodes.host.training.run") -> a module of the pack
pack = load_pack(find_comfyui())
